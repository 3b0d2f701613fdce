"""The arms of a comparison: ways to get a backbone, each with a name and with a student for every seed.

One grammar serves everywhere: an arm is `[NAME=]MEMBER[,MEMBER..]`, one member for all seeds, or one for each. A member
is a run folder, checkpoint or export; `MODEL@FILE`, a timm model with weights from a file; `timm:MODEL`, with those
that timm publishes; or a file of weights of the run's own model. `*` stands for all runs that match.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dtpipe.distill.downstream.extractors import RANDOM_INIT, random_student
from dtpipe.distill.downstream.tuned.heads.distilled import DistilledDecoder, decoder_of
from dtpipe.distill.student.foreign import load_foreign
from dtpipe.distill.student.load import export_layout, load_student
from dtpipe.distill.student.student import Student, StudentSpec, build_student
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import Note, say_nothing
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.rivals.weights import read_weights_file

DISTILLED = "distilled"
SEEDS = 3
"""How many where nothing says it."""
_TIMM = "timm:"
_NO_RUN = "{}: the first arm is a run of dtpipe; give other weights with --compare"


@dataclass(frozen=True)
class ArmMember:
    """One backbone: a run of dtpipe or a file of weights, of a timm model where that is named."""

    path: str | None
    """None: timm's published weights."""
    model: str | None = None
    """None: the run says it, or the weights are of the model that is compared with."""

    @property
    def is_run(self) -> bool:
        """True for what dtpipe wrote."""
        if self.path is None or self.model is not None:
            return False
        path = Path(self.path)
        if path.suffix == ".safetensors":
            return not path.is_file() or export_layout(path) is not None
        return path.suffix not in (".pth", ".bin", ".ckpt", ".tar", ".pkl") and not _is_foreign(path)


@dataclass(frozen=True)
class ArmSpec:
    """An arm as it was written."""

    name: str
    members: tuple[ArmMember, ...]


@dataclass(frozen=True)
class Arm:
    """One way to get a backbone."""

    name: str
    student_for: Callable[[int], Student]
    """The student of a seed, new at each call, on the CPU and in eval mode. Raises: ConfigError, InputError."""
    num: int | None = 1
    """How many students there are: 1 is the same for all seeds; None: another for each."""
    members: tuple[ArmMember, ...] = ()
    """Where they come from."""
    decoder_for: Callable[[int], DistilledDecoder | None] = lambda _seed: None
    """What label distillation trained beside the student of a seed; None where nothing did."""


def parse_arm(text: str, name: str | None = None) -> ArmSpec:
    """The arm that a text stands for; `name` is used where it gives none.

    Raises: ConfigError for an empty member; InputError for a pattern that nothing matches.
    """
    before, equals, after = text.partition("=")
    named = bool(equals) and "/" not in before and not os.path.lexists(text)
    if named and not (before and after):
        raise ConfigError(f"arm {text!r} must be NAME=RUN or NAME=RUN,RUN; write both sides")
    written = after if named else text
    parts = [written] if os.path.lexists(written) else written.split(",")
    if not all(parts):
        raise ConfigError(f"arm {text!r} has an empty member; write NAME=RUN,RUN without a comma at the end")
    members = tuple(member for part in parts for member in _members(part))
    return ArmSpec(before if named else name or text, members)


def _members(text: str) -> list[ArmMember]:
    path = os.path.expanduser(text)  # noqa: PTH111  as settings do
    if os.path.lexists(path):
        return [ArmMember(path)]
    model, at, file = text.removeprefix(_TIMM).partition("@")
    if at:
        return [ArmMember(os.path.expanduser(file), model)]  # noqa: PTH111
    if text.startswith(_TIMM):
        return [ArmMember(None, model)]
    if "*" not in text:
        return [ArmMember(path)]
    if not (runs := sorted(glob.glob(path))):  # noqa: PTH207  patterns with a root
        raise InputError(f"{text}: nothing matches; give run folders")
    return [ArmMember(run) for run in runs]


def runs_of(config: EvalConfig) -> tuple[str, ...]:
    """Paths of the runs that are scored, one for each seed or one for all. Raises: ConfigError when there is none."""
    runs = tuple(member.path for member in parse_arm(config.checkpoint).members if member.path is not None)
    if not runs:
        raise ConfigError(_NO_RUN.format(config.checkpoint))
    return runs


def seeds_of(config: EvalConfig, num_runs: Sequence[int]) -> range:
    """Seeds of the table: as many as asked for, or as runs of an arm. `num_runs` has the number of each arm.

    Raises: ConfigError when an arm has more than one run and not as many as there are seeds.
    """
    several = [num for num in num_runs if num > 1]
    num = config.seeds or max(several, default=SEEDS)
    if odd := [other for other in several if other != num]:
        raise ConfigError(
            f"an arm has {odd[0]} runs and there are {count_of(num, 'seed')}; seed i takes run i of each arm, so give "
            f"one run for all, or as many as there are seeds"
        )
    return range(config.seed, config.seed + num)


@dataclass(frozen=True)
class Comparison:
    """The arms of one table that have students, the first of them the one that is asked about."""

    spec: StudentSpec
    """Of the first arm's students."""
    arms: tuple[Arm, ...]
    seeds: range


def open_comparison(config: EvalConfig, note: Note) -> Comparison:
    """The run's arm and those of --compare, each member loaded once to see that it can be.

    Seed i of an arm with several runs is run i. Raises: ConfigError, InputError in a sentence.
    """
    first = parse_arm(config.checkpoint, DISTILLED)
    written = [first, *map(parse_arm, config.compare)]
    if len({arm.name for arm in written}) < len(written):
        raise ConfigError(f"two arms have one name ({', '.join(arm.name for arm in written)}); write NAME=RUN")
    seeds = seeds_of(config, [len(arm.members) for arm in written])
    spec = _check(first, None, note)
    for arm in written[1:]:
        _check(arm, spec, note)
    return Comparison(spec, tuple(_opened(arm, spec, seeds) for arm in written), seeds)


def run_notes(comparison: Comparison) -> list[str]:
    """What is to be said where all seeds are of one run."""
    first = comparison.arms[0]
    if first.num != 1 or len(comparison.seeds) < 2:
        return []
    return [
        f"{first.name} is one run at all {len(comparison.seeds)} seeds: spread and intervals hold that of labels and "
        "initialisations, not that of pre-training; give a run for each seed"
    ]


def random_arm(spec: StudentSpec) -> Arm:
    """The student before any training, with timm's initial weights drawn from the seed."""
    return Arm(RANDOM_INIT, partial(random_student, spec), None)


def _opened(arm: ArmSpec, spec: StudentSpec, seeds: range) -> Arm:
    def member_of(seed: int) -> ArmMember:
        return arm.members[seeds.index(seed) if len(arm.members) > 1 else 0]

    def student_for(seed: int) -> Student:
        return load_member(member_of(seed), spec)

    def decoder_for(seed: int) -> DistilledDecoder | None:
        member = member_of(seed)
        return decoder_of(member.path) if member.is_run and member.path is not None else None

    return Arm(arm.name, student_for, len(arm.members), arm.members, decoder_for)


def _check(arm: ArmSpec, spec: StudentSpec | None, note: Note) -> StudentSpec:
    """Load each member of an arm: they must be of one model. Raises: ConfigError naming two that are not."""
    specs = [load_member(member, spec, note).spec for member in arm.members]
    for member, other in zip(arm.members, specs, strict=True):
        if other != specs[0]:
            raise ConfigError(
                f"arm {arm.name}: {arm.members[0].path} is a {specs[0].name} of {specs[0].image_px} px and "
                f"{member.path} a {other.name} of {other.image_px}; runs of one arm differ in their seed alone"
            )
    return specs[0]


def load_member(member: ArmMember, like: StudentSpec | None, note: Note = say_nothing) -> Student:
    """The student of a member, of the size and the levels of `like` where the member does not say.

    Raises: InputError, DamagedDataError, ConfigError in a sentence; ConfigError for weights with nothing to be like.
    """
    if member.is_run:
        assert member.path is not None
        return load_student(member.path)
    if like is None:
        raise ConfigError(_NO_RUN.format(member.path or member.model))
    spec = replace(like, name=member.model or like.name)
    if member.path is None:
        return build_student(spec, pretrained=True).eval()
    foreign = load_foreign(spec, read_weights_file(Path(member.path)), member.path)
    note(foreign.said)
    return foreign.student


def _is_foreign(path: Path) -> bool:
    """True for a torch file that dtpipe did not write."""
    from dtpipe.distill.engine.checkpoint import CHECKPOINT_FORMAT

    if not path.is_file() or path.suffix != ".pt":
        return False
    with path.open("rb") as file:
        head = file.read(1 << 16)
    return CHECKPOINT_FORMAT.partition("/")[0].encode() not in head
