"""Seeds that are added to a table of before: they train at the rates that it chose, and stand beside its scores.

One rule: only what is of the same question is put together. The table must have the same arms, numbers of labelled
images, held-out images and training, and none of the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dtpipe.distill.downstream.result import ProbeResult, Score
from dtpipe.manifests.documents import Refusal
from dtpipe.manifests.errors import ConfigError, DamagedDataError, InputError
from dtpipe.manifests.records.document import read_document
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.tune.cells import TunedTable
from dtpipe.pipeline.tune.rates import RateChoice

_REFUSAL = Refusal(DamagedDataError, "give the file that `dtpipe eval` wrote of a task that trains")
_OWN = ("lr", "lr_grid", "lr_choice", "folds", "run")
"""Settings that may be others: how rates were chosen, and where trainings run."""
_SAME = ("task", "labelled", "foreground", "ignore_value", "px", "resize", "limit")
"""Settings of the evaluation that may not be, beside those of training."""


@dataclass(frozen=True)
class EarlierTable:
    """A table of before."""

    path: Path
    result: ProbeResult
    config: Mapping[str, Any]
    """The settings that it was made with."""

    @classmethod
    def read(cls, path: Path) -> EarlierTable:
        """Raises: InputError where there is none; DamagedDataError for another kind of file."""
        try:
            document = read_document(path, _REFUSAL.advice)
        except FileNotFoundError as err:
            raise InputError(f"{path}: there is no such file; {_REFUSAL.advice}") from err
        try:
            return cls(path, _result(document), dict(document["config"]))
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise _REFUSAL.of(path, f"is no result of an evaluation ({type(err).__name__}: {err})") from err

    def check(self, config: EvalConfig, table: TunedTable) -> None:
        """Raises: ConfigError where these settings ask another question, or for seeds that it has."""
        now, before = config.model_dump(mode="json"), self.config
        pairs = [(f"eval.{name}", before.get(name), now[name]) for name in _SAME]
        trained = before.get("tune") or {}
        pairs += [
            (f"eval.tune.{name}", trained.get(name), value) for name, value in now["tune"].items() if name not in _OWN
        ]
        pairs.append(("number of held-out images", self.result.num_test, len(table.test)))
        pairs.append(("arms", sorted(self.result.arms()), sorted(arm.name for arm in table.arms)))
        for name, old, new in pairs:
            if old != new:
                raise ConfigError(
                    f"{self.path} has {name} {old!r}, and here it is {new!r}; seeds are added to an equal table"
                )
        if twice := sorted({score.seed for score in self.result.scores} & set(table.seeds)):
            last = max(score.seed for score in self.result.scores)
            raise ConfigError(
                f"{self.path} has seed {twice[0]} already; begin with another, as -s eval.seed={last + 1}"
            )

    def rates(self) -> dict[tuple[str, int], RateChoice]:
        """By name of the arm and number of labelled images: what its first seed trained at."""
        chosen: dict[tuple[str, int], RateChoice] = {}
        for score in sorted(self.result.scores, key=lambda score: score.seed):
            tried = tuple((float(lr), value) for lr, value in score.settings.get("rates", {}).items())
            choice = RateChoice(float(score.settings["lr"]), score.selection, tried)
            chosen.setdefault((score.extractor, score.num_labelled), choice)
        return chosen


def earlier_table(config: EvalConfig) -> EarlierTable | None:
    """The table that seeds are added to, where the settings name one. Raises: as `EarlierTable.read`; ConfigError."""
    if config.add_to is None:
        return None
    if config.test_images is None or config.resplit:
        raise ConfigError(
            "eval.add_to needs the same held-out images at every seed: give --test-images, and no --resplit"
        )
    return EarlierTable.read(Path(config.add_to))


def _result(document: Mapping[str, Any]) -> ProbeResult:
    """Raises: KeyError, TypeError, ValueError for another document."""
    scores = tuple(Score(**score) for score in document["scores"])
    if not scores or any("lr" not in score.settings for score in scores):
        raise ValueError("it has no scores of trainings")
    plain = {part.name: document[part.name] for part in fields(ProbeResult) if part.name not in ("scores", "notes")}
    return ProbeResult(**plain, scores=scores, notes=tuple(document["notes"]))
