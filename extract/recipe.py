"""From settings to a recipe: what the source, the teacher and the settings together say about every byte to come.

`extract` and `plan` share this. Where a dataset is there already, `auto` settings take its answer, so that the same
command goes on with it on whatever machine it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from dtpipe.extract.census import Census, take_census
from dtpipe.extract.config import CodecConfig, ExtractConfig, ExtractRecipeConfig, ExtractRun
from dtpipe.extract.device import pick_device
from dtpipe.extract.fitting.base import FitRequest
from dtpipe.extract.fitting.request import codec_recipe, fit_request
from dtpipe.extract.sources.base import Source
from dtpipe.extract.sources.registry import SOURCES, open_images
from dtpipe.extract.teachers.base import Generator, TapSpec, Teacher, TeacherSpec
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.codecs.registry import is_fitted_codec, open_codec
from dtpipe.manifests.errors import ConfigError, InputError, TeacherError
from dtpipe.manifests.schema import (
    SYNTHESIZED,
    CodecSpec,
    ComputeRecipe,
    LevelSpec,
    Order,
    Recipe,
    ShardRecipe,
    SourceRecipe,
    StoredDtype,
    TeacherRecipe,
    TransformRecipe,
    ViewSpec,
    height_width,
)
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.listing import Listing, build_listing, read_key_file
from dtpipe.manifests.write.plan import bytes_per_sample, find_plan, shard_samples_for

NO_CODEC = CodecConfig()  # every level under cast
Config = TypeVar("Config", bound=ExtractRecipeConfig)


@dataclass(frozen=True)
class Resolved:
    """Settings with everything looked up: the recipe, and the open parts it came from."""

    config: ExtractConfig
    recipe: Recipe
    teacher: Teacher  # loaded on `device` for inline runs, else on the CPU
    source: Source
    selection: Mapping[str, Any]
    """What chose the rows but is no content; compared when a dataset is gone on with."""
    listed: Listing | None
    """The listing of a dataset that is to begin."""
    census: Census | None
    """What the source holds, where a dataset is to begin."""
    fit: FitRequest | None = None
    """What is to be fitted before the plan, and is not in the recipe yet."""

    @cached_property
    def listing(self) -> Listing:
        """The samples by row; where a dataset is there already, lists the source when first asked."""
        return self.listed or list_source(self.config, self.source)


def resolve_recipe(
    config: ExtractConfig, *, fresh: bool = False, cluster_has_gpus: Callable[[], bool | None] | None = None
) -> Resolved:
    """Look at existing output, source and teacher, the cheapest first, and fix all that determines the content;
    writes nothing.

    fresh: refuse a dataset that is there. cluster_has_gpus: asked only where the recipe depends on it; None asks this
    machine.
    Raises: ConfigError, InputError, TeacherError.
    """
    plan = find_plan(Store(config.run.out), fresh)
    stored = plan.recipe if plan else None
    config = with_timesteps_of(config, stored.views if stored else ())
    kind = stored.source.kind if stored and config.source.kind == "auto" else config.source.kind
    source = open_images(config.images, config.num_samples, kind)
    census = None if stored else _census(config, source)
    listed = None if stored else list_source(config, source)
    selection: dict[str, Any] = {
        "limit": config.limit,
        "keys_blake3": None
        if config.keys is None
        else blake3_hex("\n".join(read_key_file(config.keys, "extract.keys")).encode()),
        **({"num_samples": config.num_samples} if config.num_samples else {}),
    }
    device = device_type(config.run, stored, cluster_has_gpus)
    if config.run.inline:
        pick_device(device)
    teacher = load_teacher(config.teacher, device if config.run.inline else "cpu")
    recipe = make_recipe(config, teacher, source.kind, device)
    fit = fit_request(config, recipe)
    if fit is not None:
        selection["fit"] = fit.record()
    return Resolved(config, recipe, teacher, source, selection, listed, census, fit)


def list_source(config: ExtractRecipeConfig, source: Source) -> Listing:
    """The samples that the settings choose, by row. Raises: InputError as the source and `build_listing` do."""
    keys = None if config.keys is None else read_key_file(config.keys, "extract.keys")
    with _listing(config):
        items = source.list()
    return build_listing(items, _order(config, source.kind), config.source.seed, config.limit, keys)


def _census(config: ExtractRecipeConfig, source: Source) -> Census:
    with _listing(config):
        return take_census(source)


@contextmanager
def _listing(config: ExtractRecipeConfig) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise InputError(f"{config.images}: cannot be listed ({err}); check the path of your images") from err


def _order(config: ExtractRecipeConfig, source_kind: str) -> Order:
    """As asked, or as the source is best read. Synthesized samples are independent draws and stay in the order of
    their numbers."""
    if source_kind == SYNTHESIZED:
        return "container"
    return SOURCES[source_kind].order if config.source.order == "auto" else config.source.order


def make_recipe(config: ExtractRecipeConfig, teacher: Teacher, source_kind: str, device: str) -> Recipe:
    """The recipe that settings and a teacher give. Raises: ConfigError when they do not fit each other."""
    spec = teacher.spec
    image_px = height_width(config.transform.px or spec.image_px)
    check_role(teacher, source_kind)
    if source_kind == SYNTHESIZED:
        _check_synthesized(config, spec, image_px)
    shrunk = (image_px[0] // spec.student_scale, image_px[1] // spec.student_scale)
    student_px = height_width(config.student_px or shrunk)
    levels = stored_levels(spec.levels, image_px, student_px, config.shard.dtype, config.codec)
    if spec.is_noise:
        levels = tuple(level.model_copy(update={"role": "noise"}) for level in levels)
    views = make_views(config, spec)
    samples = config.shard.samples or shard_samples_for(
        bytes_per_sample(levels, len(views), image_px if config.shard.images == "stored" else None)
    )
    transform = config.transform
    return Recipe(
        source=SourceRecipe(kind=source_kind, order=_order(config, source_kind), seed=config.source.seed),
        transform=TransformRecipe(
            resize="none" if source_kind == SYNTHESIZED else transform.resize,
            height=image_px[0],
            width=image_px[1],
            filter=transform.filter,
            antialias=transform.antialias,
        ),
        student_px=student_px,
        teacher=TeacherRecipe(kind=spec.kind, weights_blake3=spec.weights_blake3, options=dict(spec.options)),
        noise_seed=config.noise.seed,
        views=views,
        levels=levels,
        images=config.shard.images,
        image_coding=config.shard.image_coding_of(image_px, config.codec.plain),
        codec=codec_recipe(config, levels, device),
        shard=ShardRecipe(format=config.shard.format, samples=samples),
        compute=ComputeRecipe(
            device=device, dtype=config.teacher.dtype, batch_size=config.batch_size, threads=config.threads
        ),
    )


def make_views(config: ExtractRecipeConfig, spec: TeacherSpec) -> tuple[ViewSpec, ...]:
    """Every combination of timestep, draw and flip, in this order; a teacher without diffusion has no timestep.

    Raises: ConfigError for a timestep that the teacher does not have, or one given twice.
    """
    noise = config.noise
    chosen = noise.timesteps or (spec.timestep,)
    _check_encoding(config, spec, chosen)
    timesteps: tuple[int | None, ...] = chosen
    if spec.num_timesteps is None:
        timesteps = (None,)
    elif wrong := [step for step in chosen if not 0 <= step < spec.num_timesteps]:
        raise ConfigError(
            f"extract.noise.timesteps has {wrong[0]}; this teacher has timesteps 0 to {spec.num_timesteps - 1}"
        )
    if len(set(timesteps)) < len(timesteps):
        raise ConfigError(
            f"extract.noise.timesteps {list(chosen)} names a timestep twice; use extract.noise.draws for more "
            "noise draws"
        )
    flips = (False, True) if noise.flips else (False,)
    return tuple(
        ViewSpec(draw=draw, timestep=step, flip=flip)
        for step in timesteps
        for draw in range(noise.draws)
        for flip in flips
    )


def with_timesteps_of(config: Config, views: Sequence[ViewSpec]) -> Config:
    """The settings with the timesteps of views that were chosen before, where they leave them open."""
    known = tuple(dict.fromkeys(view.timestep for view in views if view.timestep is not None))
    if config.noise.timesteps is not None or not known:
        return config
    return config.model_copy(update={"noise": config.noise.model_copy(update={"timesteps": known})})


def _check_encoding(config: ExtractRecipeConfig, spec: TeacherSpec, timesteps: Sequence[int]) -> None:
    """A deterministic encoding has one draw, and DDIM inversion stops at multiples of its stride. Raises:
    ConfigError."""
    if not spec.noise_shapes and config.noise.draws > 1:
        raise ConfigError(
            f"extract.noise.draws is {config.noise.draws}, and this teacher's encoding has no noise; leave it out"
        )
    if spec.num_timesteps is None:
        return
    stride = int(spec.options.get("inversion_stride", 1))
    if odd := [step for step in timesteps if step % stride]:
        raise ConfigError(
            f"extract.noise.timesteps has {odd[0]}, no multiple of extract.teacher.options.inversion_stride {stride}; "
            "change one"
        )


def check_role(teacher: Teacher, source_kind: str) -> None:
    """A generator needs numbered samples, an encoder images. Raises: TeacherError."""
    kind = teacher.spec.kind
    if isinstance(teacher, Generator) and source_kind != SYNTHESIZED:
        raise TeacherError(
            f"a {kind} teacher makes its own images and cannot encode others; give --num-samples instead of --images"
        )
    if not isinstance(teacher, Generator) and source_kind == SYNTHESIZED:
        raise TeacherError(f"a {kind} teacher encodes images and makes none; give --images instead of --num-samples")


def _check_synthesized(config: ExtractRecipeConfig, spec: TeacherSpec, image_px: tuple[int, int]) -> None:
    """A generator's images have its own size and one view. Raises: ConfigError."""
    if config.noise.draws > 1 or config.noise.flips:
        raise ConfigError(
            "a synthesized image has one view; leave out extract.noise.draws and extract.noise.flips, or make more "
            "samples"
        )
    if image_px != spec.image_px:
        raise ConfigError(
            f"extract.transform.px is {image_px[0]}x{image_px[1]}; this teacher makes "
            f"{spec.image_px[0]}x{spec.image_px[1]} px"
        )


def stored_levels(
    taps: tuple[TapSpec, ...],
    image_px: tuple[int, int],
    student_px: tuple[int, int],
    dtype: StoredDtype,
    codecs: CodecConfig = NO_CODEC,
) -> tuple[LevelSpec, ...]:
    """The teacher's levels as stored: strides and names count pixels of the student's image; `codecs` are of those
    to regress, where they need no fit.

    Raises: ConfigError when the image's sides are no multiple of the largest stride, or the student's are no 2^n-th
    of them, or there is no such codec.
    """
    largest = max(tap.stride for tap in taps)
    if any(side % largest for side in image_px):
        raise ConfigError(
            f"extract.transform.px is {image_px[0]}x{image_px[1]}; this teacher needs sides that are multiples of "
            f"{largest}"
        )
    levels = [_stored_level(tap, image_px, student_px, dtype) for tap in taps]
    if unknown := sorted(codecs.levels.keys() - {level.name for level in levels if level.role == "features"}):
        raise ConfigError(
            f"extract.codec.levels names {unknown[0]}, and the levels of features are "
            f"{', '.join(level.name for level in levels if level.role == 'features')}"
        )
    return tuple(_coded(level, codecs) for level in levels)


def _coded(level: LevelSpec, codecs: CodecConfig) -> LevelSpec:
    """Under a codec where it holds features: the latents that a teacher reads are rounded as they always were. One that
    is to be fitted has no parameters yet."""
    name = codecs.name_for(level.name)
    if level.role == "features" and not is_fitted_codec(name):
        level = level.model_copy(update={"codec": CodecSpec(name=name)})
    open_codec(level)
    return level


def _stored_level(
    tap: TapSpec, image_px: tuple[int, int], student_px: tuple[int, int], dtype: StoredDtype
) -> LevelSpec:
    height, width = image_px[0] // tap.stride, image_px[1] // tap.stride
    stride = student_px[0] // height
    if (stride * height, stride * width) != student_px or stride & (stride - 1):
        raise ConfigError(
            f"extract.student_px is {student_px[0]}x{student_px[1]}, and level {tap.name} has {height}x{width} cells "
            f"for an image of {image_px[0]}x{image_px[1]} px; the student's image must be smaller by a power of two, "
            "in both sides"
        )
    suffix = tap.name.partition(".")[1] + tap.name.partition(".")[2]
    name = f"l{int(math.log2(stride))}{suffix}"
    return LevelSpec(
        name=name, stride=stride, channels=tap.channels, height=height, width=width, dtype=dtype, tap=tap.tap
    )


def device_type(run: ExtractRun, stored: Recipe | None, cluster_has_gpus: Callable[[], bool | None] | None) -> str:
    """Device type: as asked, as the dataset began, or by what there is."""
    if run.device != "auto":
        return run.device
    if stored is not None:
        return stored.compute.device
    has_gpus = cluster_has_gpus() if cluster_has_gpus else None
    return pick_device("auto") if has_gpus is None else "cuda" if has_gpus else "cpu"
