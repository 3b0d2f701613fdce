"""`dtpipe.extract`, `distill` and `evaluate`: the commands as functions, with the same settings and the same errors.

One rule: nothing is done here that the command does not do; what differs is that a result comes back, and that nothing
ends the process.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from dtpipe.manifests.errors import ConfigError
from dtpipe.pipeline.cli.console import Console
from dtpipe.pipeline.cli.options import Call, Flag, called_as, interruptible
from dtpipe.pipeline.cli.settings import check_key, gather
from dtpipe.pipeline.commands import distill as distill_command
from dtpipe.pipeline.commands import evaluate as evaluate_command
from dtpipe.pipeline.commands import extract as extract_command

if TYPE_CHECKING:
    from dtpipe.distill.downstream.result import ProbeResult
    from dtpipe.distill.student.student import Student
    from dtpipe.distill.trainer import DistillResult
    from dtpipe.extract.tally import ExtractResult

PathOrUrl = str | os.PathLike[str]
Configs = str | Sequence[str]
_WHOLE = "what is written is whole, and the same call goes on"


def extract(
    images: PathOrUrl | None = None,
    teacher: PathOrUrl | None = None,
    out: PathOrUrl | None = None,
    *,
    config: Configs = (),
    settings: Mapping[str, Any] | None = None,
    fresh: bool = False,
    **flags: Any,
) -> ExtractResult:
    """Run a teacher over images and write a feature dataset, or finish it; as `dtpipe extract`.

    flags: those of the command, as in `px=64, timesteps=[50], flips=True`. config: files or presets, as -c. settings:
    any other key, as in {"extract.shard.samples": 1024}. The result has `url`, `num_ok`, `digest` and more.
    Raises: DtpipeError of the kind that fits; StoppedError after Ctrl-C, when what is whole is kept.
    """
    given = {"images": images, "teacher": teacher, "out": out, **flags}
    call = _call("extract", extract_command.FLAGS, given, config, settings)
    with called_as(_spoken("extract", given, config, settings)), interruptible(_WHOLE):
        return extract_command.extracted(call, fresh)


def distill(
    datasets: PathOrUrl | Sequence[PathOrUrl] = (),
    student: str | None = None,
    out: PathOrUrl | None = None,
    *,
    config: Configs = (),
    settings: Mapping[str, Any] | None = None,
    fresh: bool = False,
    **flags: Any,
) -> DistillResult:
    """Pre-train a student on feature datasets, or go on; as `dtpipe distill`.

    flags, config and settings: as of `extract`; without a dataset, `images` and `teacher` train with the live teacher.
    The result has `run_dir`, `checkpoint`, `losses` and more.
    Raises: DtpipeError of the kind that fits; StoppedError after Ctrl-C, when the state is saved.
    """
    urls = [datasets] if isinstance(datasets, str | PurePath) else list(datasets)  # type: ignore[arg-type]
    given = {"url": urls or None, "student": student, "out": out, **flags}
    call = _call("distill", distill_command.FLAGS, given, config, settings)
    with called_as(_spoken("distill", given, config, settings)), interruptible(_WHOLE):
        return distill_command.distilled(call, fresh)


def evaluate_run(
    checkpoint: PathOrUrl | Sequence[PathOrUrl],
    task: str | None = None,
    images: PathOrUrl | None = None,
    *,
    config: Configs = (),
    settings: Mapping[str, Any] | None = None,
    **flags: Any,
) -> ProbeResult:
    """Score a student with few labels beside its rivals; as `dtpipe eval`.

    flags, config and settings: as of `extract`, such as `labelled=[10, 50], seeds=3`. The result has `to_table()`,
    which is what the command prints, and `summaries()`; the JSON lies in the run folder.
    Raises: DtpipeError of the kind that fits.
    """
    runs = [checkpoint] if isinstance(checkpoint, str | PurePath) else list(checkpoint)  # type: ignore[arg-type]
    given = {"checkpoint": runs, "task": task, "images": images, **flags}
    call = _call("evaluate", evaluate_command.FLAGS, given, config, settings)
    with called_as(_spoken("evaluate", given, config, settings)), interruptible(_WHOLE):
        return evaluate_command.scored(call).result


def load_backbone(run_or_file: PathOrUrl, ema: bool = True) -> Student:
    """The trained student of a run folder, a checkpoint or an export: a torch module, on the CPU and in eval mode.

    It takes images (B, 3, H, W) in [-1, 1] and gives its levels, finest first, each (B, C, h, w); `strides` and
    `channels` say which. `net` is the timm model inside.
    Raises: InputError when there is none; DamagedDataError when it cannot be read.
    """
    from dtpipe.distill.student.load import load_student

    return load_student(os.fspath(run_or_file), ema)


def _call(
    function: str,
    flags: Sequence[Flag],
    given: Mapping[str, Any],
    config: Configs,
    settings: Mapping[str, Any] | None,
) -> Call:
    """The command's call with these values. Raises: ConfigError for an unknown name."""
    by_name = {_python_name(name): flag.key for flag in flags for name in (flag.name, *flag.aliases)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        key = by_name.get(name.rstrip("_"))
        if key is None:
            near = difflib.get_close_matches(name, by_name, n=1)
            meant = f", did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"dtpipe.{function} takes no {name!r}{meant}; it takes the flags of the command, and any key in "
                "settings={'section.key': value}"
            )
        values[key] = _plain(value)
    sets = {key: _plain(value) for key, value in (settings or {}).items()}
    for key in sets:
        check_key(key, f"dtpipe.{function}: settings")
    document = gather([config] if isinstance(config, str) else config, sets, values)
    return Call(document, False, Console(), {key: name for name, key in by_name.items()})


def _python_name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _plain(value: Any) -> Any:
    """As a settings file would hold it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _spoken(function: str, given: Mapping[str, Any], config: Configs, settings: Mapping[str, Any] | None) -> str:
    """The call as Python, for the records beside outputs."""
    parts = {**given, "config": config or None, "settings": settings or None}
    shown = (f"{name}={_plain(value)!r}" for name, value in parts.items() if value is not None)
    return f"dtpipe.{function}({', '.join(shown)})"
