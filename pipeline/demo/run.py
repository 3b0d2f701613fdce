"""`dtpipe demo`: the real commands, one after another, on digit scenes or on the user's own folder.

Every step is a command line that is printed and run as it stands; nothing here does what a user could not do.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from dtpipe.extract.sources.base import SourceItem
from dtpipe.manifests.errors import ConfigError, DemoStepError, InputError
from dtpipe.manifests.records.document import read_document
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import Console, ProgressLine, format_seconds
from dtpipe.pipeline.config import DemoConfig
from dtpipe.pipeline.demo.folder import held_folder

FEW = (5, 20, 80)


@dataclass
class DemoResult:
    """Where things are, what they scored, how long each step took."""

    report: Path
    run: Path
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Features to score by number of labelled images; empty where there is nothing to score on."""
    metric: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


def shipped_teacher() -> Path:
    """The folder of the teacher of digit scenes that comes with the package."""
    return Path(str(files("dtpipe.pipeline.demo") / "teacher"))


def run_demo(config: DemoConfig, console: Console, fresh: bool = False) -> DemoResult:
    """Run every step; what an interrupted demo finished is kept, and each command goes on where it stopped.

    Raises: ConfigError and InputError before the first; DemoStepError with the code of the command that failed.
    """
    with held_folder(config, fresh, console.note) as out:
        demo = _Demo(config, console, out)
        return demo.own_images() if config.images else demo.digit_scenes()


class _Demo:
    """The steps over one folder."""

    def __init__(self, config: DemoConfig, console: Console, out: Path) -> None:
        self.config, self.console, self.out = config, console, out
        self.features, self.run = out / "features", out / "run"
        self.result = DemoResult(self.run / "report.html", self.run)

    def digit_scenes(self) -> DemoResult:
        """Scenes, the shipped teacher, a dense read-out on held-out scenes."""
        from dtpipe.pipeline.demo.scenes import write_scenes

        config, scenes, held_out = self.config, self.out / "scenes", self.out / "held-out"
        self.console.result(
            f"{config.num_images} digit scenes for distillation, {config.num_held_out} to score on, seed {config.seed}"
        )
        started = time.monotonic()
        with ProgressLine("demo"):
            write_scenes(scenes, config.num_images, config.seed)
            write_scenes(held_out, config.num_held_out, config.seed, part="held_out")
        self.result.seconds["scenes"] = time.monotonic() - started
        teacher = config.teacher or str(shipped_teacher())
        self._extract_and_distill(str(scenes / "images"), teacher, [])
        masks = ["--images", scenes / "images", "--masks", scenes / "semantic", "--test-images", held_out / "images"]
        few = ",".join(str(num) for num in FEW if num <= config.num_images)
        masks += ["--test-masks", held_out / "semantic", "--foreground", "--labelled", few]
        self._step("eval", self.run, "readout", *masks, "--seeds", 1, "--teacher", teacher)
        self._report(teacher)
        return self._finish("readout")

    def own_images(self) -> DemoResult:
        """The user's folder: a small teacher of its own, and a class probe where it has class folders."""
        from dtpipe.extract.sources.registry import open_source

        config = self.config
        assert config.images is not None
        source = open_source(config.images)
        num_images = min(len(source.list()), config.num_images)
        if num_images < 16:
            raise InputError(f"{config.images} has {count_of(num_images, 'image')}; the demo needs 16 or more")
        self.console.result(f"{num_images} images of {config.images}, as {source.kind}")
        limit = ["--limit", config.num_images]
        teacher = config.teacher or str(self.out / "teacher")
        if config.teacher is None:
            self.console.result(
                "first a small teacher of your images: minutes give a poor one, hours a good one (or give --teacher)"
            )
            settings = ["-c", "demo_teacher", "--steps", config.teacher_steps, "--seed", config.seed]
            self._step("train-teacher", *settings, "--images", config.images, "--out", teacher, *limit)
        self._extract_and_distill(config.images, teacher, limit)
        if has_classes(config.images, source.list(), self.console):
            self.console.result("your images have labels: a linear probe of them, which distillation did not see")
            self._step(
                "eval",
                self.run,
                "probe",
                "--images",
                config.images,
                "--seeds",
                1,
                "--teacher",
                teacher,
                "--limit",
                config.num_images,
            )
        self._report(teacher)
        return self._finish("probe")

    def _extract_and_distill(self, images: str, teacher: str, limit: Sequence[object]) -> None:
        config = self.config
        settings = [
            "-c",
            "digits",
            "-s",
            f"extract.source.seed={config.seed}",
            "-s",
            f"extract.noise.seed={config.seed}",
        ]
        self._step(
            "extract",
            *settings,
            "--images",
            images,
            "--teacher",
            teacher,
            "--out",
            self.features,
            "--workers",
            config.workers,
            *limit,
        )
        self._step("verify", self.features, "--level", "digest")
        self._step(
            "distill",
            self.features,
            "-c",
            "digits",
            "--out",
            self.run,
            "--epochs",
            config.epochs,
            "--seed",
            config.seed,
        )

    def _report(self, teacher: str) -> None:
        self._step(
            "report",
            self.run,
            "--teacher",
            teacher,
            "--num-samples",
            8,
            "--sample-steps",
            25,
            "-s",
            f"report.seed={self.config.seed}",
        )

    def _step(self, *words: object) -> None:
        """Print one command line and run it. Raises: DemoStepError."""
        args = [str(word) for word in words]
        self.console.result(f"\n$ {shlex.join(['dtpipe', *args])}")
        started = time.monotonic()
        stdout = sys.stderr if self.console.as_json else None
        with subprocess.Popen([sys.executable, "-m", "dtpipe.pipeline.cli.main", *args], stdout=stdout) as process:
            before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
            try:
                code = process.wait()
            except KeyboardInterrupt:  # the terminal sends it to the command as well
                process.wait()
                raise
            finally:
                signal.signal(signal.SIGTERM, before)
        self.result.seconds[args[0]] = time.monotonic() - started
        if code:
            error = DemoStepError(
                f"the demo stopped at `dtpipe {args[0]}`, which exited with {code}; its message stands above; "
                "run the same command again to go on, or with --fresh to start over"
            )
            error.exit_code = code if code > 0 else 128 - code  # a command that a signal ended has its negative number
            raise error

    def _finish(self, task: str) -> DemoResult:
        path = self.run / "eval" / f"{task}.json"
        if path.is_file():
            document = read_document(path, "run the demo again with --fresh")
            self.result.metric = document["metric"]
            self.result.scores = headline_scores(document)
        return self.result


def has_classes(images: str, items: Sequence[SourceItem], console: Console) -> bool:
    """True when a class probe of the images says something; where there are labels that do not, why is printed."""
    from dtpipe.extract.sources.layouts.generic.folders import class_folders

    if all(item.label is None for item in items):
        return False
    try:
        class_folders(images, items)
    except ConfigError as err:
        console.result(f"\nno class probe: {err}")
        return False
    return True


def headline_scores(document: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Mean of the headline by features and number of labelled images, from an evaluation's JSON."""
    from dtpipe.distill.downstream.result import headline_of

    scores: dict[str, dict[str, float]] = {}
    for summary in headline_of(document):
        scores.setdefault(summary.extractor, {})[str(summary.num_labelled)] = summary.mean
    return scores


def print_result(console: Console, result: DemoResult) -> None:
    """The score table and the report's path."""
    spent = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in result.seconds.items())
    console.result(f"\nall in {format_seconds(sum(result.seconds.values()))}: {spent}\n")
    if result.scores:
        numbers = sorted({num for row in result.scores.values() for num in row}, key=int)
        console.result(
            f"{result.metric} on held-out images, from few labelled ones; features frozen, all levels, one seed"
        )
        rows = [
            (name, *(f"{row[num]:.3f}" if num in row else "-" for num in numbers))
            for name, row in result.scores.items()
        ]
        console.table(("features", *(f"{num} labelled" for num in numbers)), rows)
        console.result()
    console.result(f"report: {result.report.resolve()}")
    console.document(result)
