"""BigGAN teachers: kind `biggan` reads ajbrock/BigGAN-PyTorch's generators, IC-GAN's, and conversions of DeepMind's.

Images and features follow from `z` and, where the class is sampled, the `label` noise. An "unconditional" BigGAN was
trained with class 0 for all images, so set `class_label=0`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, model_validator

from dtpipe.extract.teachers.arithmetic import arithmetic, storable
from dtpipe.extract.teachers.base import (
    Generator,
    TapSpec,
    TeacherKind,
    TeacherSpec,
    architecture,
    parse_options,
)
from dtpipe.extract.teachers.biggan.initial import initial_biggan_weight
from dtpipe.extract.teachers.biggan.keys import (
    RELATIVES,
    generator_weights,
    infer_biggan_layout,
    refuse_relatives,
    with_shared_embedding,
)
from dtpipe.extract.teachers.biggan.origin import check_origin, default_epsilons, say_what_is_assumed
from dtpipe.extract.teachers.files.names import names_tensors
from dtpipe.extract.teachers.files.untrained import redrawn
from dtpipe.extract.teachers.files.weights import load_strictly, read_weights, weights_digest
from dtpipe.extract.teachers.gan import Table, choose_rows, truncate
from dtpipe.manifests.errors import ConfigError, ShapeError, TeacherError
from dtpipe.manifests.schema import StrictModel

if TYPE_CHECKING:
    from torch import Tensor

    from dtpipe.extract.config import TeacherConfig
    from dtpipe.extract.teachers.biggan.network import BigGanLayout, BigGanNetwork

MARKS = ("linear.weight", "blocks.0.0.conv1.weight", "output_layer.2.weight")
INSTANCE_MARK = "shared_feat.weight"  # IC-GAN's

_log = logging.getLogger(__name__)


class SamplingOptions(StrictModel):
    """How a latent is made from `z`, and what a file's shapes do not tell."""

    truncation: Literal["none", "clamp", "truncated_normal"] = Field(
        default="none",
        description="How latent numbers are kept within the threshold: not, cut off there, or drawn from within.",
    )
    threshold: float | None = Field(
        default=None, gt=0, description="Largest latent number before z_scale; IC-GAN's truncation t is 2t."
    )
    z_scale: float = Field(
        default=1.0, gt=0, description="Factor of the latent; TFHub's truncation t is this with truncated_normal at 2."
    )
    bn_eps: float | None = Field(
        default=None, gt=0, description="Epsilon of batch norms; default 1e-5, or 1e-4 for DeepMind's models."
    )
    sn_eps: float | None = Field(
        default=None, gt=0, description="Epsilon of spectral norms; default 1e-6, or 1e-4 for DeepMind's models."
    )
    standing_stats: bool | None = Field(
        default=None, description="Whether statistics are sums over accumulation_counter batches."
    )
    pool_missing: bool = Field(
        default=False, description="Make levels deeper than the deepest block by average pooling it."
    )

    @model_validator(mode="after")
    def _threshold_if_truncated(self) -> SamplingOptions:
        if (self.threshold is None) != (self.truncation == "none"):
            raise ValueError("truncation clamp and truncated_normal need a threshold, and none takes none")
        return self


class BigGanOptions(SamplingOptions):
    """What `extract.teacher.options` may hold."""

    class_label: int | Literal["sampled"] = Field(
        default="sampled", description="One class for all images, or sampled for each."
    )


class BigGanTeacher:
    """A frozen generator and its condition's tables on their device."""

    def __init__(
        self, network: BigGanNetwork, tables: Sequence[Table], spec: TeacherSpec, options: SamplingOptions, dtype: str
    ) -> None:
        from dtpipe.extract.teachers.taps import TapReader, is_pooled

        self.network = network
        self.tables = tables
        self.spec = spec
        self.options = options
        self.dtype = dtype
        self._reader = TapReader(network, {level.name: level.tap for level in spec.levels if not is_pooled(level)})

    def synthesize(self, noise: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images and the features of the last layer at each resolution, the attention layer where there is one.

        Shapes: noise["z"] (B, z size), and noise["label"] (B, n) where something is sampled
        -> images (B, 3, H, W) float32 in [-1, 1], {level: (B, C, h, w)} float32 or float16.
        Raises: ShapeError when noise is missing or of another shape.
        """
        from dtpipe.extract.teachers.taps import add_pooled

        self._check_noise(noise)
        images: list[Tensor] = []
        with arithmetic(noise["z"].device, self.dtype):
            latent = truncate(noise["z"], self.options.truncation, self.options.threshold) * self.options.z_scale
            condition = choose_rows(self.tables, noise.get("label"), len(latent))
            levels = self._reader.read(lambda: images.append(self.network(latent, condition)), stop_early=False)
            return images[0], add_pooled({name: storable(level) for name, level in levels.items()}, self.spec.levels)

    def _check_noise(self, noise: Mapping[str, Tensor]) -> None:
        for stream, shape in self.spec.noise_shapes.items():
            actual = tuple(noise[stream].shape[1:]) if stream in noise else None
            if actual != shape:
                raise ShapeError(f"noise[{stream!r}] is {actual} per image, this teacher takes {shape}")


def is_biggan_path(path: str) -> bool:
    """True for a generator with BigGAN's tensor names, IC-GAN's apart, and for relatives, which loading names."""
    file = Path(path)
    if any(names_tensors(file, (name,)) for name in RELATIVES):
        return True
    return names_tensors(file, MARKS) and not names_tensors(file, (INSTANCE_MARK,))


def load_biggan_teacher(config: TeacherConfig, device: str = "cpu") -> BigGanTeacher:
    """The teacher that `config` names, frozen and in eval mode.

    Raises: TeacherError when the file is missing, damaged or another network; ConfigError for an unfit option.
    """
    given = parse_options(config, BigGanOptions)
    published = read_generator(config.path)
    check_origin(published, given.model_fields_set, config.path)
    options = with_epsilons(given, published)
    published = redrawn(published, initial_biggan_weight, config.untrained)
    tensors = published if "shared.weight" in published else with_shared_embedding(published, config.path)
    classes = class_embeddings(tensors, None if options.class_label == "sampled" else options.class_label, config.path)
    _, layout = infer_biggan_layout(tensors, {"a class embedding": classes.rows.shape[1]}, config.path)
    say_what_is_assumed(published, layout, given.model_fields_set, config.path)
    network = build_network(tensors, layout, options, config.path)
    conditions = {"class_label": options.class_label}
    return make_biggan_teacher(
        "biggan", config, options, network, (classes,), conditions, weights_digest(published), device
    )


def read_generator(path: str) -> dict[str, Tensor]:
    """A checkpoint's tensors. Raises: TeacherError when it is missing, a folder, damaged or holds other things."""
    if Path(path).is_dir():
        names = ", ".join(sorted(file.name for file in Path(path).glob("G_ema*.pth"))) or "it has none"
        raise TeacherError(f"{path}: is a folder; give the path of a G_ema file in it ({names})")
    if Path(path).suffix == ".pkl":
        raise TeacherError(
            f"{path}: is a pickle, as of IC-GAN's StyleGAN2 backbone, which no kind reads; "
            f"give a G or G_ema file (.pth) of a BigGAN backbone"
        )
    tensors = read_weights(Path(path))
    refuse_relatives(tensors, path)
    return tensors


_Sampling = TypeVar("_Sampling", bound=SamplingOptions)


def with_epsilons(options: _Sampling, tensors: Mapping[str, Tensor]) -> _Sampling:
    """The options with the epsilons that a file's origin implies, where they are not given."""
    default = default_epsilons(tensors)
    epsilons = {"bn_eps": options.bn_eps or default.batch_norm, "sn_eps": options.sn_eps or default.spectral_norm}
    return options.model_copy(update=epsilons)


def class_embeddings(tensors: Mapping[str, Tensor], label: int | None, where: str) -> Table:
    """Class embeddings. Raises: TeacherError when they are damaged; ConfigError for a label that there is not."""
    rows = tensors["shared.weight"].float()
    if rows.ndim != 2 or 0 in rows.shape or not bool(rows.isfinite().all()):
        raise TeacherError(f"{where}: shared.weight is no table of finite class embeddings; download it again")
    if label is not None and not 0 <= label < len(rows):
        raise ConfigError(f"extract.teacher.options.class_label is {label}; {where} has classes 0 to {len(rows) - 1}")
    return Table(rows, label)


def build_network(
    tensors: Mapping[str, Tensor], layout: BigGanLayout, options: SamplingOptions, where: str
) -> BigGanNetwork:
    """The generator with its weights, frozen, on the CPU. Raises: TeacherError when they do not fit."""
    import torch

    from dtpipe.extract.teachers.biggan.network import BigGanNetwork

    assert options.bn_eps and options.sn_eps  # `with_epsilons`
    weights = generator_weights(tensors, options.sn_eps, options.standing_stats, where)
    with torch.device("meta"):  # memory comes with weights that fit
        network = BigGanNetwork(layout, options.bn_eps)
    load_strictly(network, weights, Path(where))
    return network.eval().requires_grad_(False)


def make_biggan_teacher(
    kind: str,
    config: TeacherConfig,
    options: SamplingOptions,
    network: BigGanNetwork,
    tables: Sequence[Table],
    conditions: Mapping[str, Any],
    digest: str,
    device: str,
) -> BigGanTeacher:
    """A teacher from its parts on the CPU. `conditions` is what the spec says of the tables."""
    layout = network.layout
    sampled = sum(len(table.rows) for table in tables if table.constant is None)
    spec = TeacherSpec(
        kind=kind,
        weights_blake3=digest,
        image_px=(layout.image_px, layout.image_px),
        levels=_levels_of(network, config.taps, options.pool_missing),
        noise_shapes={"z": (layout.z_size,), **({"label": (sampled,)} if sampled else {})},
        options={
            **options.model_dump(include=set(SamplingOptions.model_fields)),
            "network": architecture(layout),
            **conditions,
        },
    )
    on_device = [Table(table.rows.to(device), table.constant) for table in tables]
    return BigGanTeacher(network.to(device), on_device, spec, options, config.dtype)


def _levels_of(network: BigGanNetwork, taps: Mapping[str, str] | None, pool_missing: bool) -> tuple[TapSpec, ...]:
    """Levels at the named taps, or at the last layer of each resolution; then the pooled ones. From fine to deep."""
    import torch

    from dtpipe.extract.teachers.taps import DEFAULT_STRIDES, level_name, named_levels, pooled_level

    layout = network.layout
    if taps:
        with torch.inference_mode():
            inputs = torch.zeros(1, layout.z_size), torch.zeros(1, layout.condition)
            levels = list(named_levels(network, lambda: network(*inputs), layout.image_px, taps).values())
    else:
        levels = [level for level in _block_levels(layout) if level.stride in DEFAULT_STRIDES]
    levels.sort(key=lambda level: (level.stride, level.name))
    missing = [stride for stride in DEFAULT_STRIDES if stride > levels[-1].stride]
    if pool_missing:
        return (*levels, *(pooled_level(levels[-1], stride) for stride in missing))
    if missing and not taps:
        _log.warning(
            "the blocks of this %d px generator have no level %s; left out "
            "(can be pooled: -s extract.teacher.options.pool_missing=true)",
            layout.image_px,
            ", ".join(map(level_name, missing)),
        )
    return tuple(levels)


def _block_levels(layout: BigGanLayout) -> list[TapSpec]:
    from dtpipe.extract.teachers.taps import level_name

    strides = [1 << (len(layout.attention) - 1 - block_idx) for block_idx in range(len(layout.attention))]
    return [
        TapSpec(level_name(stride), stride, width, f"blocks.{block_idx}.{int(attends)}")
        for block_idx, (stride, width, attends) in enumerate(
            zip(strides, layout.widths[1:], layout.attention, strict=True)
        )
    ]


KIND = TeacherKind(
    kind="biggan",
    reads="A G or G_ema file of BigGAN-PyTorch or of IC-GAN's BigGAN, or DeepMind's BigGAN converted by "
    "BigGAN-PyTorch.",
    protocol=Generator,
    matches=is_biggan_path,
    load=load_biggan_teacher,
    options=BigGanOptions,
    untrained=True,
)
