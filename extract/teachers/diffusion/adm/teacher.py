"""ADM teachers (Dhariwal & Nichol, arXiv 2105.05233): kind `adm` reads guided-diffusion's `.pt` files as published.

The file is mapped into memory, not copied, and nothing in it is executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dtpipe.extract.teachers.base import Encoder, TeacherKind, parse_options
from dtpipe.extract.teachers.diffusion.adm.keys import initial_adm_weight, published_shapes, unet_tensors
from dtpipe.extract.teachers.diffusion.adm.layout import (
    AdmLayout,
    AdmOptions,
    complete,
    infer_adm_layout,
    scheduler_config,
)
from dtpipe.extract.teachers.diffusion.unet import DiffusionTeacher, LoadedUNet, make_diffusion_teacher
from dtpipe.extract.teachers.files.names import names_tensors
from dtpipe.extract.teachers.files.refusals import no_file
from dtpipe.extract.teachers.files.torch_files import load_torch, stored_tensors, unwrapped
from dtpipe.extract.teachers.files.untrained import redrawn
from dtpipe.extract.teachers.files.weights import check_fit, weights_digest
from dtpipe.manifests.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from dtpipe.extract.config import TeacherConfig

_MARKS = ("input_blocks.0.0.weight", "time_embed.0.weight")  # whole names; latent diffusion puts a prefix before them


def is_adm_file(path: str) -> bool:
    """True for a torch file whose tensors have guided-diffusion's names. Its pickle is searched, not loaded."""
    return Path(path).suffix in (".pt", ".pth") and names_tensors(Path(path), _MARKS)


def load_adm_teacher(config: TeacherConfig, device: str = "cpu") -> DiffusionTeacher:
    """The teacher that `config` names, frozen and in eval mode.

    Raises: TeacherError when the file is missing, damaged, or another network; ConfigError when options that the file
    does not tell are missing or do not fit it.
    """
    import torch

    from dtpipe.extract.teachers.diffusion.adm.network import AdmNetwork

    options = parse_options(config, AdmOptions)
    tensors = _read_mapped(Path(config.path))
    layout = infer_adm_layout({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config.path)
    tensors = redrawn(tensors, initial_adm_weight, config.untrained)
    settings = complete(options, layout, config.path)
    _check_label(options.class_label, layout, config.path)
    with torch.device("meta"):
        unet = AdmNetwork(layout, settings)
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    check_fit(tensors, published_shapes(layout, shapes), Path(config.path))
    unet.load_state_dict(dict(unet_tensors(tensors, layout, settings, options.class_label)), assign=True)
    loaded = LoadedUNet(
        unet=unet,
        weights_blake3=weights_digest(tensors),
        image_px=settings.image_px,
        scheduler=(scheduler := scheduler_config(options, settings)),
        options={
            "scheduler": scheduler,
            "network": layout.sizes(),
            **settings.recipe(),
            **({} if options.class_label is None else {"class_label": options.class_label}),
        },
        where=config.path,
    )
    return make_diffusion_teacher("adm", loaded, config, options, device)


def _read_mapped(path: Path) -> dict[str, Tensor]:
    """All tensors of the file, mapped where its format allows (torch 1.6 and later). Raises: TeacherError."""
    if not path.is_file():
        raise no_file(path, "ADM")
    return unwrapped(stored_tensors(load_torch(path, mapped=True), path), path)


def _check_label(label: int | None, layout: AdmLayout, where: str) -> None:
    if layout.num_classes is None and label is not None:
        raise ConfigError(
            f"{where}: the network is not class-conditional; leave out extract.teacher.options.class_label"
        )
    if layout.num_classes is not None and (label is None or label >= layout.num_classes):
        raise ConfigError(
            f"{where}: the network is class-conditional; give all images one class, 0 to {layout.num_classes - 1}, "
            f"with -s extract.teacher.options.class_label=... (found {label}), or use an unconditional checkpoint"
        )


KIND = TeacherKind(
    kind="adm",
    reads="A guided-diffusion .pt file (ADM): ImageNet at 64 to 512 px, LSUN and FFHQ, or your own with its training "
    "flags as options.",
    protocol=Encoder,
    matches=is_adm_file,
    load=load_adm_teacher,
    options=AdmOptions,
    untrained=True,
)
