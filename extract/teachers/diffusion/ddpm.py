"""Pixel diffusion models as diffusers writes them: kind `ddpm`.

Read: a `UNet2DModel` folder, a `DDPMPipeline` folder, or a hub repository of either at a pinned commit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from dtpipe.extract.teachers.base import Encoder, TeacherKind, parse_options
from dtpipe.extract.teachers.diffusion.files import UNetFiles, find_unet, is_unet_path, modern_names
from dtpipe.extract.teachers.diffusion.unet import DiffusionTeacher, LoadedUNet, PixelOptions, make_diffusion_teacher
from dtpipe.extract.teachers.files.untrained import drawn_from
from dtpipe.extract.teachers.files.variants import VARIANT
from dtpipe.extract.teachers.files.weights import load_strictly, read_weights, weights_digest
from dtpipe.manifests.canonical import blake3_hex, canonical_json
from dtpipe.manifests.errors import ConfigError, TeacherError

if TYPE_CHECKING:
    from dtpipe.extract.config import TeacherConfig


class DdpmOptions(PixelOptions):
    """Options of kind `ddpm`."""

    class_label: int | None = Field(
        default=None,
        ge=0,
        description="For a class-conditional network: the class that all images get; default: its null class.",
    )
    variant: str | None = VARIANT


def load_ddpm_teacher(config: TeacherConfig, device: str = "cpu") -> DiffusionTeacher:
    """The teacher that `config` names, frozen and in eval mode.

    Raises: TeacherError when it is missing, damaged, or a network that this family cannot represent.
    """
    options = parse_options(config, DdpmOptions)
    files = find_unet(config.path, config.revision, options.variant)
    label = _class_label(options.class_label, files)
    with drawn_from(config.untrained):
        unet = _build(files)
    tensors = modern_names(read_weights(files.weights)) if config.untrained is None else dict(unet.state_dict())
    load_strictly(unet, tensors, files.weights)
    content: dict[str, Any] = {
        "scheduler": files.scheduler,
        "unet_blake3": blake3_hex(canonical_json(files.architecture)),
    }
    if label is not None:
        unet, content = _of_one_class(unet, files, label), {**content, "class_label": label}
    loaded = LoadedUNet(unet, weights_digest(tensors), files.image_px, files.scheduler, content, str(files.folder))
    return make_diffusion_teacher("ddpm", loaded, config, options, device)


def _class_label(label: int | None, files: UNetFiles) -> int | None:
    """The class that all images get; None for an unconditional network. Raises: ConfigError when the two do not fit."""
    if files.num_classes is None:
        if label is not None:
            raise ConfigError(
                f"{files.folder}: the network is not class-conditional; leave out extract.teacher.options.class_label"
            )
        return None
    chosen = files.null_class if label is None else label
    if chosen is None or chosen >= files.num_classes:
        raise ConfigError(
            f"{files.folder}: the network is class-conditional; give all images one class, 0 to "
            f"{files.num_classes - 1}, with -s extract.teacher.options.class_label=... (found {chosen}), "
            f"or train it with label_dropout, which adds a null class"
        )
    return chosen


def _of_one_class(unet: Any, files: UNetFiles, label: int) -> Any:
    """A class-conditional network as an unconditional one for one class, whose embedding joins the timestep's bias."""
    tensors = unet.state_dict()
    embedding = tensors.pop("class_embedding.weight")
    tensors["time_embedding.linear_2.bias"] = tensors["time_embedding.linear_2.bias"] + embedding[label]
    single = _build(replace(files, architecture={**files.architecture, "num_class_embeds": None}))
    single.load_state_dict(tensors)
    return single


def _build(files: UNetFiles) -> Any:
    from diffusers import UNet2DModel

    try:
        return UNet2DModel(**files.architecture)
    except Exception as err:  # the constructor raises what its parts raise
        raise TeacherError(
            f"{files.folder}/config.json: diffusers cannot build this UNet2DModel ({err}); check the file"
        ) from err


KIND = TeacherKind(
    kind="ddpm",
    reads="A diffusers UNet2DModel or DDPMPipeline folder, or a hub id of one with a pinned revision.",
    protocol=Encoder,
    matches=is_unet_path,
    load=load_ddpm_teacher,
    options=DdpmOptions,
    untrained=True,
)
