"""The text that a Stable Diffusion teacher is conditioned on: one prompt for all images, embedded once.

The embedding comes from the pipeline's own CLIP text encoder (package transformers), or from a safetensors file that
holds it already. It is computed in float32 on the CPU; what goes into a recipe is the digest of what it follows from,
not of its floats, since CPUs differ in their last bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtpipe.extract.teachers.files.variants import TEXT_STEMS, find_part
from dtpipe.extract.teachers.files.weights import load_strictly, read_json, read_weights, weights_digest
from dtpipe.manifests.canonical import blake3_hex, canonical_json
from dtpipe.manifests.errors import ConfigError, MissingPackageError, TeacherError

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "text_model."  # of tensor names in published files and in transformers before version 5
_BOOKKEEPING = "embeddings.position_ids"


@dataclass(frozen=True)
class TextEmbedding:
    """A text as the U-Net sees it."""

    values: Tensor
    """(1, T, D) float32, T tokens."""
    blake3: str
    """Digest of what the values follow from."""


def read_embedding(path: Path, width: int) -> TextEmbedding:
    """The one tensor of a safetensors file, (T, D) or (1, T, D).

    Raises: TeacherError when the file is damaged or holds something else.
    """
    tensors = read_weights(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    values = next(iter(tensors.values())).float() if len(tensors) == 1 else None
    if (
        values is None
        or values.ndim not in (2, 3)
        or values.shape[-1] != width
        or values.numel() != values.shape[-2] * width
    ):
        raise TeacherError(f"{path}: holds {shapes}; a text embedding is one tensor of shape (tokens, {width})")
    if not bool(values.isfinite().all()):
        raise TeacherError(f"{path}: holds values that are not finite; make the text embedding again")
    return TextEmbedding(values.reshape(1, *values.shape[-2:]), weights_digest(tensors))


def embed_prompt(root: Path, prompt: str, width: int, variant: str | None = None) -> TextEmbedding:
    """The last hidden state of the pipeline's text encoder for a prompt, padded as its tokenizer says.

    Raises: MissingPackageError without transformers; ConfigError for a prompt with too many tokens; TeacherError when
    the encoder or the tokenizer is missing, damaged or of another kind.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as err:
        raise MissingPackageError(
            "a Stable Diffusion teacher embeds its prompt with the package transformers; `pip install 'dtpipe[sd]'`, "
            "or give the embedding as extract.teacher.options.text_embedding"
        ) from err
    folder = root / "text_encoder"
    path = find_part(folder, TEXT_STEMS, variant)
    encoder = _text_encoder(folder, width)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in read_weights(path).items()}
    tensors.pop(_BOOKKEEPING, None)
    spelling = {name.removeprefix(_PREFIX): name for name in encoder.state_dict()}
    load_strictly(encoder, {spelling.get(name, name): tensor for name, tensor in tensors.items()}, path)
    token_ids = _token_ids(root / "tokenizer", prompt, encoder.config)
    digest = blake3_hex(canonical_json({"text_encoder": weights_digest(tensors), "token_ids": token_ids}))
    return TextEmbedding(_last_hidden_state(encoder, token_ids), digest)


def _text_encoder(folder: Path, width: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip_text_model" or config.get("hidden_size") != width:
        raise TeacherError(
            f"{folder}/config.json: holds a {config.get('model_type')} of width {config.get('hidden_size')}, "
            f"the U-Net takes a clip_text_model of width {width}; use files of one checkpoint"
        )
    try:
        encoder: Any = CLIPTextModel(CLIPTextConfig.from_dict(config))
    except Exception as err:  # the constructor raises what its parts raise
        raise TeacherError(
            f"{folder}/config.json: transformers cannot build this text encoder ({err}); check the file"
        ) from err
    return encoder.eval()


def _token_ids(folder: Path, prompt: str, encoder: Any) -> list[int]:
    """Begin, prompt, end, then the tokenizer's padding up to the length that the encoder takes."""
    from transformers import CLIPTokenizer

    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():  # transformers goes on without
            raise TeacherError(f"{folder}: holds no {name}; download or export the teacher again")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as err:  # missing and damaged files raise many types
        reason = (str(err).strip() or type(err).__name__).splitlines()[0][:160]
        raise TeacherError(
            f"{folder}: no CLIP tokenizer can be read ({reason}); download or export the teacher again"
        ) from err
    if len(tokenizer) != encoder.vocab_size:
        raise TeacherError(
            f"{folder}: has {len(tokenizer)} tokens, the text encoder {encoder.vocab_size}; use files of one checkpoint"
        )
    length = encoder.max_position_embeddings
    token_ids: list[int] = tokenizer(prompt, padding="max_length", max_length=length).input_ids
    if len(token_ids) > length:
        raise ConfigError(
            f"extract.teacher.options.prompt has {len(token_ids)} tokens, the text encoder takes {length}; shorten it"
        )
    return token_ids


def _last_hidden_state(encoder: Any, token_ids: list[int]) -> Tensor:
    """After the encoder's last norm. Shapes: T tokens -> (1, T, D)."""
    import torch

    with torch.inference_mode():
        values: Tensor = encoder(torch.tensor([token_ids]))[0]
    return values.clone()
