"""An interpreter at work: which views and levels it reads of features, and the soft labels that come out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.labels.files import LoadedInterpreter, load_interpreter
from dtpipe.distill.labels.interpreter import FeatureInterpreter, InterpreterSpec, views_in_channels
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.codecs.topk import TOPK
from dtpipe.manifests.differences import differences, listed
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.schema import CodecSpec, LevelSpec, Recipe, StoredDtype
from dtpipe.manifests.soft_labels import LabelView, label_views, soft_label_name

LOGITS = "logits"
"""Where the level of soft labels is read, as its tap says it."""
_LARGEST_STRIDE = 512  # of a level's name


@dataclass(frozen=True)
class OpenHead:
    """An interpreter on a device, for the views of some features."""

    network: FeatureInterpreter
    level: LevelSpec
    """Of the soft labels."""
    views: Sequence[LabelView]
    device: str

    @torch.inference_mode()
    def soft_labels(self, levels: Mapping[str, Tensor], batch_size: int) -> dict[str, Tensor]:
        """Logits, averaged down to the level's cells. A row's do not depend on the rows beside it: short batches are
        padded.

        Shapes: {level: (B, V, C, h, w)} of at most a batch -> {level of soft labels: (B, V', K, h, w)}, float32.
        """
        num_rows, read = len(next(iter(levels.values()))), [level.name for level in self.network.spec.levels]
        padded = {name: self._padded(levels[name], batch_size) for name in read}
        logits = [
            self.network(
                views_in_channels({name: [values[:, idx] for idx in view.reads] for name, values in padded.items()})
            )
            for view in self.views
        ]
        shrunk = [at_cells(values, self.level) for values in logits]
        return {self.level.name: torch.stack(shrunk, dim=1)[:num_rows]}

    def _padded(self, values: Tensor, batch_size: int) -> Tensor:
        values = values.to(self.device, torch.float32).contiguous()  # other layouts round otherwise
        missing = batch_size - len(values)
        return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing > 0 else values


def at_cells(logits: Tensor, level: LevelSpec) -> Tensor:
    """Logits averaged down to the cells of a level of soft labels. Shapes: (B, K, H, W) -> (B, K, h, w)."""
    cells = (level.height, level.width)
    return logits if logits.shape[-2:] == cells else F.adaptive_avg_pool2d(logits, cells)


def open_head(interpreter: str, recipe: Recipe, features: Recipe, device: str) -> OpenHead:
    """The interpreter that a recipe of soft labels names, for features of another recipe.

    Raises: TeacherError when the folder holds another one; as `load_interpreter`.
    """
    loaded = load_interpreter(interpreter, device)
    if loaded.digest != recipe.teacher.weights_blake3:
        raise TeacherError(
            f"{interpreter} on {os.uname().nodename}: the interpreter has digest {loaded.digest[:16]}.., the plan says "
            f"{recipe.teacher.weights_blake3[:16]}..; give every node the same one, or choose another --out"
        )
    views = views_of(loaded, features)
    (level,) = recipe.levels
    return OpenHead(loaded.network, level, views, device)


def features_record(features: Recipe, names: Sequence[str]) -> dict[str, Any]:
    """What an interpreter says of the features of some levels that it was trained on: all that a teacher's depend on,
    but for noise and codecs.
    """
    taps = {level.name: level.tap for level in features.levels if level.name in names}
    made = features.model_dump(mode="json", include={"teacher", "transform"})
    return {**made, "taps": taps}


def refuse_other_features(loaded: LoadedInterpreter, features: Recipe, where: str) -> None:
    """See that features are of the teacher, the taps and the image size that an interpreter was trained on, as far as
    it says them.

    Raises: TeacherError naming what differs.
    """
    own = features_record(features, [level.name for level in loaded.network.spec.levels])
    said = {name: loaded.record[name] for name in own if isinstance(loaded.record.get(name), Mapping)}
    if changes := differences(said, {name: own[name] for name in said}):
        raise TeacherError(
            f"the interpreter was trained on other features than {where} has ({listed(changes)}); give it features "
            "that are made as those were, or train another (`dtpipe interpret`)"
        )


def views_of(loaded: LoadedInterpreter, features: Recipe) -> tuple[LabelView, ...]:
    """The views of an interpreter's soft labels. Raises: ConfigError as `label_views`."""
    timesteps = loaded.record.get("timesteps")
    trained = timesteps if isinstance(timesteps, list) else None
    return label_views(features.views, loaded.network.spec.num_views, trained)


def levels_read(spec: InterpreterSpec, levels: Sequence[LevelSpec], where: str) -> tuple[LevelSpec, ...]:
    """The levels of features that an interpreter reads. Raises: ConfigError naming the one that is not there."""
    stored = {level.name: level for level in levels if level.role == "features"}
    for level in spec.levels:
        found = stored.get(level.name)
        if found is None or (found.stride, found.channels) != (level.stride, level.channels):
            there = ", ".join(f"{one.name} (stride {one.stride}, {one.channels} channels)" for one in stored.values())
            raise ConfigError(
                f"the interpreter reads level {level.name} of stride {level.stride} with {level.channels} channels, "
                f"and {where} has {there or 'no features'}; give it the features that it was trained on"
            )
    return tuple(stored[level.name] for level in spec.levels)


def label_level(
    spec: InterpreterSpec,
    read: Sequence[LevelSpec],
    student_px: tuple[int, int],
    dtype: StoredDtype = "float16",
    stride: int | None = None,
    top_k: int | None = None,
) -> LevelSpec:
    """The level of soft labels that an interpreter makes of the levels it reads.

    Raises: ConfigError for a stride or a number of classes that it cannot have.
    """
    stride, cells = _cells(stride, spec, read, student_px)
    codec = CodecSpec() if top_k is None else CodecSpec(name=TOPK, parameters={"k": top_k})
    level = LevelSpec(
        name=soft_label_name(stride),
        stride=stride,
        channels=len(spec.classes),
        height=cells[0],
        width=cells[1],
        dtype=dtype,
        tap=LOGITS,
        codec=codec,
        role="soft_labels",
    )
    open_codec(level)
    return level


def _cells(
    stride: int | None, spec: InterpreterSpec, read: Sequence[LevelSpec], student_px: tuple[int, int]
) -> tuple[int, tuple[int, int]]:
    """Stride, height and width of the logits."""
    if spec.kind == "classes":
        if stride is not None:
            raise ConfigError(
                f"--stride is {stride}, and the interpreter gives one class for the whole image; leave it out"
            )
        return min(_LARGEST_STRIDE, 1 << (max(student_px) - 1).bit_length()), (1, 1)
    finest = min(read, key=lambda level: level.stride)
    stride = finest.stride if stride is None else stride
    factor = stride // finest.stride
    if (
        stride & (stride - 1)
        or not 1 <= stride <= _LARGEST_STRIDE
        or factor < 1
        or finest.height % factor
        or finest.width % factor
    ):
        raise ConfigError(
            f"--stride is {stride}; logits of this interpreter have stride {finest.stride} and "
            f"{finest.height}x{finest.width} cells, and can be averaged down to a multiple of it by a power of 2 that "
            "divides both sides"
        )
    cells = finest.height // factor, finest.width // factor
    if cells == (1, 1):
        raise ConfigError(
            f"--stride is {stride}, which leaves one cell for the whole image, and the interpreter's classes are of "
            "pixels; give a smaller one, or train an interpreter on classes of images"
        )
    return stride, cells
