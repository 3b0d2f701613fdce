"""Where a Stable Diffusion pipeline keeps its networks and settings, and how its weights come into memory once.

A network is built without memory, then each tensor is read from the file, turned into the dtype it is computed in and
put on the device, before the next is read: 860 million weights are never in memory twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtpipe.extract.teachers.diffusion.encoding import PREDICTIONS
from dtpipe.extract.teachers.diffusion.files import VP_SCHEDULERS, modern_name
from dtpipe.extract.teachers.files.hub import download
from dtpipe.extract.teachers.files.names import plain_names
from dtpipe.extract.teachers.files.refusals import unreadable_file
from dtpipe.extract.teachers.files.variants import (
    NETWORK_STEMS,
    TEXT_STEMS,
    find_part,
    find_weights,
    hub_patterns,
)
from dtpipe.extract.teachers.files.weights import name_problems, raise_unfit, read_json, read_weights, shard_files
from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.schema import height_width

if TYPE_CHECKING:
    from torch import Tensor, nn

_SAMPLERS = {
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "LMSDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "PNDM",
}
SCHEDULERS = VP_SCHEDULERS | {f"{name}Scheduler" for name in _SAMPLERS}
"""Samplers whose config holds the betas of the network's training; which one a folder names changes no feature."""

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
}
_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"}
_INPUTS = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim",
    "time_cond_proj_dim",
    "cross_attention_norm",
)
"""Settings of U-Nets that take more than a latent, a timestep and a text, as SDXL's does."""

_HUB_FILES = ("model_index.json", "*/*.json", "tokenizer/*")
_HUB_STEMS = ({"safetensors": NETWORK_STEMS["safetensors"]}, {"safetensors": TEXT_STEMS["safetensors"]})


@dataclass(frozen=True)
class Component:
    """One network of a pipeline."""

    folder: Path
    weights: Path
    arguments: Mapping[str, Any]
    """Arguments of its class."""


@dataclass(frozen=True)
class PipelineFiles:
    """One checkpoint on disk, its settings checked."""

    root: Path
    unet: Component
    vae: Component
    scheduler: Mapping[str, Any]
    """The betas that the U-Net was trained with."""
    prediction: str
    """What its output is, one of `PREDICTIONS`; only DDIM inversion asks."""

    @property
    def latent_stride(self) -> int:
        """Image px per latent cell."""
        return int(2 ** (len(self.vae.arguments["block_out_channels"]) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.arguments.get("latent_channels", 4))

    @property
    def image_px(self) -> tuple[int, int]:
        """Height and width of the images that the U-Net was trained on."""
        height, width = height_width(self.unet.arguments["sample_size"])
        return height * self.latent_stride, width * self.latent_stride


def is_pipeline_path(path: str) -> bool:
    """True for a folder whose `unet` is a U-Net conditioned on text."""
    try:
        return read_json(Path(path) / "unet" / "config.json").get("_class_name") == "UNet2DConditionModel"
    except TeacherError:
        return False


def find_pipeline(path: str, revision: str | None = None, variant: str | None = None) -> PipelineFiles:
    """The files of a checkpoint, its settings read and checked; `variant` chooses among several files of weights.

    Raises: TeacherError when a part is missing, or is none of Stable Diffusion 1 or 2.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    wanted = [f"*/{name}" for stems in _HUB_STEMS for name in hub_patterns(variant, stems)]
    root = Path(path) if Path(path).exists() else download(path, revision, [*_HUB_FILES, *wanted])
    unet = _component(root / "unet", UNet2DConditionModel, find_weights, variant)
    vae = _component(root / "vae", AutoencoderKL, find_part, variant)
    _check_unet(unet)
    _check_vae(vae, unet)
    return PipelineFiles(root, unet, vae, *_schedule(root / "scheduler" / "scheduler_config.json"))


def build(kind: str, component: Component) -> Any:
    """A network of the diffusers class `kind` with shapes and no values, in eval mode and frozen.

    Raises: TeacherError when diffusers cannot build it from its settings.
    """
    import torch

    with torch.device("meta"):
        return construct(kind, component)


def construct(kind: str, component: Component) -> Any:
    """The same with the values that diffusers begins with."""
    import diffusers

    try:
        network = getattr(diffusers, kind)(**component.arguments)
    except Exception as err:  # the constructor raises what its parts raise
        raise TeacherError(
            f"{component.folder}/config.json: diffusers cannot build this {kind} ({err}); check the file"
        ) from err
    return network.requires_grad_(False).eval()


class StoredTensors(Mapping[str, "Tensor"]):
    """Tensors of safetensors files, each read when it is asked for and not kept."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self._places = places  # name: file, and name in it

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        path, stored_name = self._places[name]
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(stored_name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_weights(path: Path, keep: Callable[[str], bool] = lambda _: True) -> Mapping[str, Tensor]:
    """The tensors that `keep` chooses by name, under today's names; of safetensors, each is read when asked for.

    Raises: TeacherError when the file is damaged, or holds anything but tensors.
    """
    files = list(shard_files(path)) if path.suffix == ".json" else [path]
    if any(file.suffix != ".safetensors" for file in files):
        return {modern_name(name): tensor for name, tensor in read_weights(path).items() if keep(name)}
    stored = {name: file for file in files for name in _stored_names(file)}
    names = {stored_name: name for stored_name, name in plain_names(stored).items() if keep(name)}
    return StoredTensors({modern_name(name): (stored[stored_name], stored_name) for stored_name, name in names.items()})


def _stored_names(path: Path) -> list[str]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except Exception as err:  # the library raises many types for a damaged file
        raise unreadable_file(path, err, "weights") from err


def assign_weights(network: nn.Module, tensors: Mapping[str, Tensor], where: Path, device: str) -> None:
    """Give a network without values its weights on `device`, each in the dtype that the network has for it.

    Raises: TeacherError for names and shapes that do not fit, and for values that are not finite.
    """
    empty = network.state_dict()
    problems = name_problems(tensors, empty)
    values = {}
    for name in sorted(empty) if not problems else ():
        tensor, dtype = tensors[name], empty[name].dtype  # read once, since it may come from the file
        if tensor.shape != empty[name].shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the network asks for {tuple(empty[name].shape)}")
            continue
        values[name] = tensor.to(device=device, dtype=dtype, copy=True)
        if not tensor.is_floating_point() or not bool(values[name].isfinite().all()):
            problems.append(f"{name} holds values that are not finite in {str(dtype).removeprefix('torch.')}")
    raise_unfit(problems, where)
    network.load_state_dict(values, assign=True)


def _component(folder: Path, kind: Any, find: Callable[..., Path], variant: str | None) -> Component:
    config = read_json(folder / "config.json")
    if config.get("_class_name") != kind.__name__:
        name = config.get("_class_name", "config without _class_name")
        raise TeacherError(f"{folder}/config.json: holds a {name}, not the {kind.__name__} of Stable Diffusion 1 and 2")
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    arguments = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.items() if name in known
    }
    return Component(folder, find(folder, NETWORK_STEMS, variant), arguments)


def _check_unet(unet: Component) -> None:
    """Only what was tested: the blocks of Stable Diffusion, and no input besides latent, timestep and text."""
    settings, where = unet.arguments, f"{unet.folder}/config.json"
    if extra := [name for name in _INPUTS if settings.get(name) is not None]:
        raise TeacherError(
            f"{where}: {extra[0]} is {settings[extra[0]]!r}, as in no Stable Diffusion 1 or 2 "
            f"(SDXL and others are not supported)"
        )
    blocks = {
        *settings.get("down_block_types", ()),
        settings.get("mid_block_type"),
        *settings.get("up_block_types", ()),
    } - {None}
    if unknown := sorted(blocks - _BLOCKS):
        raise TeacherError(
            f"{where}: blocks of kind {', '.join(unknown)} are not supported; "
            f"Stable Diffusion has {', '.join(sorted(_BLOCKS))}"
        )
    if settings.get("attention_type", "default") != "default":
        raise TeacherError(
            f"{where}: attention_type {settings['attention_type']!r} is not supported; use a plain Stable Diffusion"
        )
    if not isinstance(settings.get("cross_attention_dim"), int):
        raise TeacherError(
            f"{where}: cross_attention_dim is {settings.get('cross_attention_dim')!r}; "
            f"write the width of its text embedding"
        )
    size = settings.get("sample_size")
    if not isinstance(size, int) and not (isinstance(size, tuple) and len(size) == 2):
        raise TeacherError(
            f"{where}: sample_size is {size!r}; write the side of the latents that the network was trained on"
        )


def _check_vae(vae: Component, unet: Component) -> None:
    settings, where = vae.arguments, f"{vae.folder}/config.json"
    latent, inputs = settings.get("latent_channels", 4), unet.arguments.get("in_channels", 4)
    if latent != inputs:
        raise TeacherError(
            f"{unet.folder}/config.json: the U-Net takes {inputs} channels and the VAE's latents have {latent}; "
            f"inpainting, depth and upscaling models need more than an image, so use a text-to-image one"
        )
    if moved := [name for name in ("shift_factor", "latents_mean", "latents_std") if settings.get(name) is not None]:
        raise TeacherError(
            f"{where}: {moved[0]} is set, as in no Stable Diffusion 1 or 2; latents that are shifted are not supported"
        )
    if "block_out_channels" not in settings:
        raise TeacherError(f"{where}: has no block_out_channels; download or export the teacher again")


def _schedule(path: Path) -> tuple[dict[str, Any], str]:
    """Betas, and what the network predicts."""
    config = read_json(path)
    if str(config.get("_class_name")) not in SCHEDULERS:
        raise TeacherError(
            f"{path}: scheduler {config.get('_class_name')} is not known to name the betas of a Stable Diffusion"
        )
    if config.get("rescale_betas_zero_snr"):
        raise TeacherError(f"{path}: rescale_betas_zero_snr is set; that schedule is not supported")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise TeacherError(f"{path}: prediction_type is {prediction!r}; {', '.join(PREDICTIONS)} are known")
    return {name: config.get(name, default) for name, default in _BETAS.items()}, prediction
