"""StyleGAN2 teachers (Karras et al., arXiv 1912.04958, 2006.06676): kind `stylegan2` makes its own images.

Reads NVIDIA's network snapshots (`.pkl`, PyTorch and TensorFlow) and rosinality's `.pt`. No code in them is executed:
the network is our own, in `network`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dtpipe.extract.noise import draw_noise
from dtpipe.extract.teachers.arithmetic import arithmetic, storable
from dtpipe.extract.teachers.base import Generator, TapSpec, TeacherKind, TeacherSpec, architecture, parse_options
from dtpipe.extract.teachers.files.names import names_tensors, pickled_name
from dtpipe.extract.teachers.files.untrained import redrawn
from dtpipe.extract.teachers.files.weights import load_strictly, weights_digest
from dtpipe.extract.teachers.stylegan2.files import read_checkpoint
from dtpipe.extract.teachers.stylegan2.initial import initial_stylegan2_weights
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.schema import StrictModel

if TYPE_CHECKING:
    from torch import Tensor

    from dtpipe.extract.config import TeacherConfig
    from dtpipe.extract.teachers.stylegan2.network import StyleGan2Layout, StyleGan2Network

LATENT, NOISE_MAPS, LABEL = "z", "style_noise", "label"
_HEAD_BYTES = 1 << 16  # the first module comes right after the settings of the training set
_PERSISTENT = (b"ctorch_utils.persistence\n", *pickled_name("torch_utils.persistence"))
NUM_MEAN_STYLES = 4096


class StyleGan2Options(StrictModel):
    """How images are drawn from the generator."""

    truncation_psi: float = Field(
        default=1.0, ge=0, description="Styles are drawn towards their mean by this factor; 1: not at all."
    )
    truncation_cutoff: int | None = Field(
        default=None, ge=1, description="How many of the first styles are drawn to the mean; default: all."
    )
    noise_mode: Literal["random", "const", "none"] = Field(
        default="random", description="Noise maps: drawn for each image, those of the checkpoint, or none."
    )
    class_label: int | None = Field(
        default=None, ge=0, description="Class of all images, for a conditional generator; default: drawn for each."
    )
    ema: bool = Field(default=True, description="The averaged weights; false: those of the last training step.")
    lr_mlp: float | None = Field(
        default=None, gt=0, description="Mapping's learning rate of a .pt, which does not tell it; default: 0.01."
    )
    ignored_settings: tuple[str, ...] = Field(
        default=(), description="Settings of a changed .pkl that are known to change none of the generator's outputs."
    )


class StyleGan2Teacher:
    """A frozen generator on its device."""

    def __init__(self, network: StyleGan2Network, spec: TeacherSpec, options: StyleGan2Options, dtype: str) -> None:
        from dtpipe.extract.teachers.taps import TapReader

        self.network = network
        self.spec = spec
        self.options = options
        self.dtype = dtype
        self._reader = TapReader(network, {level.name: level.tap for level in spec.levels})

    def synthesize(self, noise: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images and the features they were made through; a class is the place of the greatest number in `label`.

        Shapes: noise["z"] (B, z_dim), ["style_noise"] (B, values of all maps), ["label"] (B, classes)
        -> (B, 3, H, W) float32 in [-1, 1], {level: (B, C, h, w)} float32.
        """
        outputs: list[Tensor] = []
        with arithmetic(noise[LATENT].device, self.dtype):
            levels = self._reader.read(
                lambda: outputs.append(make_images(self.network, noise, self.options)), stop_early=False
            )
        (output,) = outputs
        images = output.clamp(-1, 1).where(output.isfinite(), float("nan"))  # an overflow must not look like white
        return images, {name: storable(level) for name, level in levels.items()}


def make_images(network: StyleGan2Network, noise: Mapping[str, Tensor], options: StyleGan2Options) -> Tensor:
    """The generator's forward pass. Shapes: as `StyleGan2Teacher.synthesize` -> (B, 3, H, W), not clamped."""
    z = noise[LATENT]
    styles = network.styles(
        z, _one_hot(network.layout, noise, options), options.truncation_psi, options.truncation_cutoff
    )
    if options.noise_mode == "none":
        return network.synthesis(styles, None)  # type: ignore[no-any-return]
    maps = network.constant_noise() if options.noise_mode == "const" else network.noise_maps(noise[NOISE_MAPS])
    return network.synthesis(styles, maps)  # type: ignore[no-any-return]


def _one_hot(layout: StyleGan2Layout, noise: Mapping[str, Tensor], options: StyleGan2Options) -> Tensor | None:
    """Shapes: -> (B, classes), or None for a generator without classes."""
    import torch
    from torch.nn.functional import one_hot

    if not layout.num_classes:
        return None
    z, label = noise[LATENT], options.class_label
    classes = noise[LABEL].argmax(dim=1) if label is None else torch.full((len(z),), label, device=z.device)
    return one_hot(classes, layout.num_classes).to(z.dtype)


def load_stylegan2_teacher(config: TeacherConfig, device: str = "cpu") -> StyleGan2Teacher:
    """The teacher that `config` names, frozen and in eval mode.

    Raises: TeacherError when the file is missing, damaged, unsafe or another network; ConfigError for an unfit option.
    """
    import torch

    from dtpipe.extract.teachers.stylegan2.network import StyleGan2Network

    options = parse_options(config, StyleGan2Options)
    path = Path(config.path)
    tensors, layout = read_checkpoint(path, options.ema, options.lr_mlp, options.ignored_settings)
    tensors = redrawn(tensors, initial_stylegan2_weights(layout.mapping_lr), config.untrained) | _filters(tensors)
    _check_options(options, layout, config.path)
    needs_mean = "mapping.w_avg" not in tensors and not layout.num_classes
    mean = {"mapping.w_avg": torch.zeros(layout.w_dim)} if needs_mean else {}
    with torch.device("meta"):  # memory comes with weights that fit
        network = StyleGan2Network(layout).requires_grad_(False).eval()
    load_strictly(network, tensors | mean, path)
    if needs_mean and options.truncation_psi != 1:
        _set_mean_style(network)
    spec = TeacherSpec(
        kind="stylegan2",
        weights_blake3=weights_digest(tensors),
        image_px=layout.image_px,
        levels=_levels(network, options, config),
        noise_shapes=_noise_shapes(layout, options),
        options={
            **options.model_dump(mode="json", exclude={"lr_mlp", "ignored_settings"}),  # the network says the former
            "network": architecture(layout),
        },
    )
    return StyleGan2Teacher(network.to(device), spec, options, config.dtype)


def _filters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is no weight: the low-pass filters, which stay."""
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".resample_filter")}


def _check_options(options: StyleGan2Options, layout: StyleGan2Layout, where: str) -> None:
    label, cutoff = options.class_label, options.truncation_cutoff
    if label is not None and label >= layout.num_classes:
        known = f"classes 0 to {layout.num_classes - 1}" if layout.num_classes else "no classes"
        raise ConfigError(
            f"{where}: the generator has {known}; "
            f"change or leave out extract.teacher.options.class_label (found {label})"
        )
    if cutoff is not None and cutoff > layout.num_styles:
        raise ConfigError(
            f"{where}: the generator has {layout.num_styles} styles; "
            f"lower extract.teacher.options.truncation_cutoff (found {cutoff})"
        )


def _set_mean_style(network: StyleGan2Network) -> None:
    """Give a checkpoint without a mean style one. Source: rosinality/stylegan2-pytorch `generate.py`."""
    import torch

    z = torch.from_numpy(draw_noise(0, "w_avg", 0, LATENT, (NUM_MEAN_STYLES, network.layout.z_dim)))
    network.mapping.w_avg = network.mapping(z).mean(dim=0)


def _noise_shapes(layout: StyleGan2Layout, options: StyleGan2Options) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {LATENT: (layout.z_dim,)}
    if options.noise_mode == "random":
        shapes[NOISE_MAPS] = (sum(height * width for height, width in layout.noise_px),)
    if layout.num_classes and options.class_label is None:
        shapes[LABEL] = (layout.num_classes,)
    return shapes


def _levels(network: StyleGan2Network, options: StyleGan2Options, config: TeacherConfig) -> tuple[TapSpec, ...]:
    """The named taps, else the last convolution of each resolution at the usual strides, from fine to deep.

    Raises: TeacherError when there is none.
    """
    import torch

    from dtpipe.extract.teachers.stylegan2.network import block_name
    from dtpipe.extract.teachers.taps import DEFAULT_STRIDES, level_name, named_levels

    layout = network.layout
    if config.taps:
        zeros = {stream: torch.zeros(1, *shape) for stream, shape in _noise_shapes(layout, options).items()}
        with torch.inference_mode():
            levels = named_levels(
                network, lambda: make_images(network, zeros, options), layout.image_px[1], config.taps
            )
        return tuple(sorted(levels.values(), key=lambda level: (level.stride, level.name)))
    deepest = len(layout.channels) - 1
    blocks = {stride: deepest - (stride.bit_length() - 1) for stride in DEFAULT_STRIDES if stride <= 1 << deepest}
    if not blocks:
        raise TeacherError(
            f"{config.path}: the generator's images are too small for a layer of stride 4; use one of 16 px or more"
        )
    return tuple(
        TapSpec(level_name(stride), stride, layout.channels[idx], f"synthesis.{block_name(idx)}.conv1")
        for stride, idx in blocks.items()
    )


def is_stylegan2_file(path: str) -> bool:
    """True for a pickle of NVlabs' persistent modules, whose class loading tells, and for rosinality's files.

    Files are searched, not loaded.
    """
    file = Path(path)
    if file.suffix in (".pt", ".pth"):
        return names_tensors(file, ("g_ema", "convs.0.conv.modulation.weight"))
    try:
        if file.suffix != ".pkl" or not file.is_file():
            return False
        with file.open("rb") as opened:
            head = opened.read(_HEAD_BYTES)
    except (OSError, ValueError):  # ValueError: no path can be so
        return False
    return b"dnnlib.tflib.network" in head or any(mark in head for mark in _PERSISTENT)


KIND = TeacherKind(
    kind="stylegan2",
    reads="A StyleGAN2 generator: NVIDIA's .pkl (ADA, PyTorch or TensorFlow), or a rosinality/stylegan2-pytorch .pt; "
    "makes images.",
    protocol=Generator,
    matches=is_stylegan2_file,
    load=load_stylegan2_teacher,
    options=StyleGan2Options,
    untrained=True,
)
