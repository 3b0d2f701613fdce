"""Where an autoencoder's network and weights lie: a diffusers folder, a hub repository, or the two files of taesd."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtpipe.extract.teachers.diffusion.files import image_px_of, modern_names
from dtpipe.extract.teachers.files.hub import download
from dtpipe.extract.teachers.files.untrained import drawn_from
from dtpipe.extract.teachers.files.variants import NETWORK_STEMS, find_weights, small_hub_patterns
from dtpipe.extract.teachers.files.weights import load_strictly, read_json, read_weights, weights_digest
from dtpipe.manifests.canonical import blake3_hex, canonical_json
from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    from torch import Tensor, nn

AUTOENCODERS = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
PIPELINE_PARTS = ("vae", "vqvae", "movq")  # what pipelines call their autoencoder's folder
FULLY_CONVOLUTIONAL_PX = (256, 256)  # where the config names no size, as AutoencoderTiny's never does
TAESD_ENDINGS = (".safetensors", ".pth")


@dataclass(frozen=True)
class Autoencoder:
    """A network with its weights, float32 on the CPU: `encode` and `decode` are diffusers', images in [-1, 1]."""

    network: nn.Module
    name: str
    """Class of diffusers, or TAESD."""
    weights_blake3: str
    architecture_blake3: str
    image_px: tuple[int, int]


def is_autoencoder_path(path: str) -> bool:
    """True for the folder of one of `AUTOENCODERS`, and for taesd's files; not a pipeline's, which others read."""
    with suppress(OSError, TeacherError):
        return (
            bool(_taesd_encoders(Path(path)))
            or read_json(Path(path) / "config.json").get("_class_name") in AUTOENCODERS
        )
    return False


def read_autoencoder(
    path: str, revision: str | None, variant: str | None = None, untrained: int | None = None
) -> Autoencoder:
    """The autoencoder at a path or hub id; `variant` chooses among several files of weights, `untrained` is the seed of
    new ones.

    Raises: TeacherError when a part is missing or damaged, or the network is another.
    """
    wanted = small_hub_patterns(variant, ("", *(f"{part}/" for part in PIPELINE_PARTS)))
    root = Path(path) if Path(path).exists() else download(path, revision, ["*.json", *wanted])
    encoders = _taesd_encoders(root)
    if len(encoders) > 1:
        raise TeacherError(f"{root}: holds {len(encoders)} autoencoders; give the file of one, such as {encoders[0]}")
    if encoders and not (root / "config.json").is_file():
        return _read_taesd(encoders[0], untrained)
    if not root.is_dir():
        raise TeacherError(
            f"{path}: is a file, but no taesd one; give the folder of a diffusers "
            f"{', '.join(AUTOENCODERS[:-1])} or {AUTOENCODERS[-1]}"
        )
    return _read_diffusers(_network_folder(root), variant, untrained)


def _network_folder(root: Path) -> Path:
    return next((root / part for part in PIPELINE_PARTS if (root / part / "config.json").is_file()), root)


def _read_diffusers(folder: Path, variant: str | None, untrained: int | None) -> Autoencoder:
    config = read_json(folder / "config.json")
    name = str(config.get("_class_name"))
    if name not in AUTOENCODERS:
        raise TeacherError(f"{folder}/config.json: holds a {name}; kind vae reads {', '.join(AUTOENCODERS)}")
    if (config.get("in_channels", 3), config.get("out_channels", 3)) != (3, 3):
        raise TeacherError(
            f"{folder}/config.json: the network does not take and give RGB images; kind vae needs one that does"
        )
    weights = find_weights(folder, NETWORK_STEMS, variant)
    with drawn_from(untrained):
        network, architecture = _build(name, config, folder)
    tensors = modern_names(read_weights(weights)) if untrained is None else dict(network.state_dict())
    image_px = image_px_of(config, folder) if config.get("sample_size") else FULLY_CONVOLUTIONAL_PX
    return _loaded(network, tensors, weights, name, architecture, image_px)


def _build(name: str, config: Mapping[str, Any], folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and the arguments that made it."""
    import diffusers

    network_class = getattr(diffusers, name)
    known = set(inspect.signature(network_class.__init__).parameters) - {"self"}
    architecture = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key in known
    }
    try:
        return network_class(**architecture), architecture
    except Exception as err:  # the constructor raises what its parts raise
        raise TeacherError(f"{folder}/config.json: diffusers cannot build this {name} ({err}); check the file") from err


def _taesd_encoders(root: Path) -> list[Path]:
    """Encoder files of taesd whose decoder lies beside them: in a folder, or the one that a file belongs to."""
    if root.is_dir():
        encoders = sorted(path for path in root.glob("tae*_encoder.*") if path.suffix in TAESD_ENDINGS)
        return [path for path in encoders if _decoder_of(path).is_file()]
    encoder = root.with_name(root.name.replace("_decoder.", "_encoder."))
    ours = encoder.name.startswith("tae") and "_encoder." in encoder.name and encoder.suffix in TAESD_ENDINGS
    return [encoder] if ours and encoder.is_file() and _decoder_of(encoder).is_file() else []


def _decoder_of(encoder: Path) -> Path:
    return encoder.with_name(encoder.name.replace("_encoder.", "_decoder."))


def _read_taesd(encoder: Path, untrained: int | None) -> Autoencoder:
    from dtpipe.extract.teachers.vae.taesd import build_tiny

    decoder = _decoder_of(encoder)
    with drawn_from(untrained):
        network, tensors = build_tiny(read_weights(encoder), read_weights(decoder), decoder)
    if untrained is not None:
        tensors = dict(network.state_dict())
    return _loaded(network, tensors, encoder, "TAESD", {}, FULLY_CONVOLUTIONAL_PX)


def _loaded(
    network: nn.Module,
    tensors: dict[str, Tensor],
    where: Path,
    name: str,
    architecture: dict[str, Any],
    image_px: tuple[int, int],
) -> Autoencoder:
    load_strictly(network, tensors, where)
    frozen = network.requires_grad_(False).eval()
    return Autoencoder(frozen, name, weights_digest(tensors), blake3_hex(canonical_json(architecture)), image_px)
