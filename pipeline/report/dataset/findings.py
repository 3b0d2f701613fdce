"""What a look at a dataset says in sentences: what is wrong, what to look at, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log
from typing import Literal

from dtpipe.manifests.schema import LevelSpec
from dtpipe.manifests.words import are, count_of
from dtpipe.pipeline.report.dataset.drift import ShardFigures
from dtpipe.pipeline.report.dataset.labels import LogitSums
from dtpipe.pipeline.report.dataset.look import Looked
from dtpipe.pipeline.report.dataset.sums import LevelFigures

Severity = Literal["wrong", "look"]

_MOSTLY_NOISE, ALL_NOISE = 0.5, 0.9
ALIKE = 0.02
FEW_DIRECTIONS, OF_CHANNELS = 2.0, 8
DEAD_SHARE = 0.1
UNRELATED = 0.01
_LINEAR = 0.98
COARSE = 0.1
BAD_SHARE = 0.01
ONE_CLASS, UNSURE = 0.95, 0.9
FLOAT16_LIMIT = 65504.0
_SHOWN = 8


@dataclass(frozen=True)
class DatasetFinding:
    """One thing that is not as it should be."""

    severity: Severity
    code: str
    """For programs: `dead channels`, `drift`."""
    where: str
    """A level and timestep, or a part of the dataset."""
    text: str


def level_at(name: str, timestep: int | None, several: bool) -> str:
    """`l2`, or of several timesteps `l2 at timestep 50`."""
    return f"{name} at timestep {timestep}" if several else name


def findings_of(looked: Looked, levels: Sequence[LevelSpec], num_bad: int, num_rows: int) -> list[DatasetFinding]:
    """All findings, what is wrong first."""
    timesteps = dict.fromkeys(timestep for _, timestep in looked.levels)
    found = [*_of_rows(num_bad, num_rows)]
    for (name, timestep), figures in looked.levels.items():
        if name not in looked.soft_labels:  # logits have classes, not channels
            found += _of_level(level_at(name, timestep, len(timesteps) > 1), timestep, figures)
    for name, shards in looked.shards.items():
        found += _of_shards(name, shards)
    found += _of_relations(looked, levels)
    for name, logits in looked.soft_labels.items():
        found += _of_soft_labels(name, logits)
    return sorted(found, key=lambda finding: finding.severity != "wrong")


def verdict_of(findings: Sequence[DatasetFinding], looked: Looked, num_ok: int) -> str:
    """The verdict in a sentence."""
    wrong = sum(finding.severity == "wrong" for finding in findings)
    seen = f"in {len(looked.rows)} of {count_of(num_ok, 'good sample')}"
    more = len(findings) - wrong
    beside = f", and {count_of(more, 'thing')} to look at" if more else ""
    if wrong:
        return f"{count_of(wrong, 'thing')} {are(wrong)} wrong {seen}{beside}."
    return f"Nothing is wrong {seen}{beside}."


def _of_rows(num_bad: int, num_rows: int) -> Iterator[DatasetFinding]:
    if num_bad:
        share = num_bad / num_rows
        text = f"{num_bad} of {count_of(num_rows, 'sample')} ({share:.1%}) are bad; their reasons stand below"
        yield DatasetFinding("wrong" if share > BAD_SHARE else "look", "bad samples", "samples", text)


def _of_level(where: str, timestep: int | None, of: LevelFigures) -> Iterator[DatasetFinding]:
    if of.num_not_finite:
        text = f"{where} has {count_of(of.num_not_finite, 'value')} that are not finite; run the teacher in float32"
        yield DatasetFinding("wrong", "not finite", where, text)
    if len(of.dead) == len(of.strengths):
        text = f"{where} is constant: no channel varies, and nothing is learned from it; look at the teacher's tap"
        yield DatasetFinding("wrong", "constant level", where, text)
        return
    yield from _of_channels(where, of)
    yield from _of_variance(where, timestep, of)
    if of.relative_error is not None and of.relative_error > COARSE:
        text = f"{where}: the codec states an error of {of.relative_error:.0%} of the variance"
        yield DatasetFinding("look", "coarse codec", where, text)


def _of_channels(where: str, of: LevelFigures) -> Iterator[DatasetFinding]:
    num_channels = len(of.strengths)
    if of.dead:
        text = f"{where}: {len(of.dead)} of {count_of(num_channels, 'channel')} never vary ({_listed(of.dead)})"
        severity: Severity = "wrong" if len(of.dead) > DEAD_SHARE * num_channels else "look"
        yield DatasetFinding(severity, "dead channels", where, text)
    if of.exploding:
        top = f", up to {of.largest:.4g}" + (" of float16's 65504" if of.largest > FLOAT16_LIMIT / 4 else "")
        text = (
            f"{where}: {count_of(len(of.exploding), 'channel')} far stronger than all others ({_listed(of.exploding)}"
            f"{top}), which a squared error sees alone; whiten by dataset, or take another tap"
        )
        yield DatasetFinding("wrong", "exploding channels", where, text)
    if of.effective_rank < FEW_DIRECTIONS and num_channels >= OF_CHANNELS:
        text = (
            f"{where}: {num_channels} channels vary along {of.effective_rank:.1f} directions (effective rank); the "
            "teacher is hardly trained there, or the tap is a poor one"
        )
        yield DatasetFinding("look", "low rank", where, text)


def _of_variance(where: str, timestep: int | None, of: LevelFigures) -> Iterator[DatasetFinding]:
    at = "" if timestep is None else f"; timestep {timestep} may be too high"
    if of.equal_draws:
        text = f"{where}: all noise draws of a sample are equal, so that one would do; no noise reaches the teacher"
        yield DatasetFinding("wrong" if timestep is not None else "look", "equal draws", where, text)
    if of.noise_share is not None and of.noise_share > _MOSTLY_NOISE:
        severity: Severity = "wrong" if of.noise_share > ALL_NOISE else "look"
        text = f"{where}: {of.noise_share:.0%} of what differs between images is noise{at}"
        yield DatasetFinding(severity, "noise", where, text)
    if of.image_share is not None and of.image_share < ALIKE:
        text = (
            f"{where} is nearly the same for every image ({of.image_share:.2%} of its variance is between images): "
            f"another teacher or tap is needed{at}"
        )
        yield DatasetFinding("wrong", "images alike", where, text)


def _of_shards(name: str, shards: Sequence[ShardFigures]) -> Iterator[DatasetFinding]:
    if other := [of for of in shards if of.differs]:
        worst = max(other, key=lambda of: (abs(log(of.scale)), of.shift))
        text = (
            f"{name}: {count_of(len(other), 'shard')} {'differs' if len(other) == 1 else 'differ'} from the others "
            f"({_listed([of.shard for of in other])}); shard {worst.shard} is shifted by {worst.shift:.2g} deviations "
            f"of samples, variance times {worst.scale:.2g}: another worker, weights or precision, or a source that is "
            "not shuffled (order `container`); `dtpipe verify --level recompute` tells which"
        )
        yield DatasetFinding("wrong", "drift", name, text)


def _of_relations(looked: Looked, levels: Sequence[LevelSpec]) -> Iterator[DatasetFinding]:
    strides = {level.name: level.stride for level in levels}
    for (source, target), value in looked.between.items():
        if value is not None and value > _LINEAR and strides[source] < strides[target]:
            text = f"{target} is a linear map of {source} (R² {value:.3f}): storing both gains little"
            yield DatasetFinding("look", "linear levels", target, text)
    known = {name: value for name, value in looked.of_pixels.items() if value is not None}
    if known:
        finest = min(known, key=lambda name: strides[name])
        if known[finest] < UNRELATED:
            text = (
                f"{finest} does not follow the pixels of the images (R² {known[finest]:.3f} from colours below each "
                "cell): features of other images, or of noise alone"
            )
            yield DatasetFinding("look", "unrelated to images", finest, text)


def _of_soft_labels(name: str, logits: LogitSums) -> Iterator[DatasetFinding]:
    shares = logits.class_shares
    if float(shares.max()) > ONE_CLASS:
        text = f"{name}: class {int(shares.argmax())} is the likeliest in {shares.max():.0%} of all cells"
        yield DatasetFinding("look", "one class", name, text)
    if logits.num_classes > 1 and logits.mean_entropy > UNSURE * log(logits.num_classes):
        text = f"{name}: the interpreter is unsure everywhere (entropy {logits.mean_entropy:.2f} nats)"
        yield DatasetFinding("look", "unsure", name, text)


def _listed(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return ", ".join(map(str, numbers[:_SHOWN])) + more
