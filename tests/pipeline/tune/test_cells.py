"""Which trainings a table has, on which images, in which folders, and what it says of the rates."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dtpipe.distill.downstream.kept import folder_names
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.registry import find_tuned
from dtpipe.distill.downstream.tuned.run import TuneResult
from dtpipe.distill.downstream.tuned.trainer import TuneJob
from dtpipe.manifests.errors import DivergedError, LockHeldError
from dtpipe.manifests.store.hold import hold
from dtpipe.manifests.store.publish import write_whole
from dtpipe.pipeline.arms import random_arm
from dtpipe.pipeline.tune.cells import TunedTable, rate_notes, run_cells
from dtpipe.pipeline.tune.rates import RateChoice
from parts.tuning import STUDENT, bright_halves, tune_config


def table(train: LabelledSet, test: LabelledSet, *nums: int | None, resplit: bool = False) -> TunedTable:
    arms = [random_arm(STUDENT), random_arm(STUDENT)]
    return TunedTable(find_tuned("finetune"), arms, train, test, nums, range(3), tune_config(), resplit)


def test_arms_share_labels_seeds_draw_others_and_a_smaller_draw_is_part_of_a_larger() -> None:
    cells = list(table(bright_halves(10, 0), bright_halves(4, 1), 4, 6, 10, None).cells())
    assert [(len(cell.labelled), cell.seed, cell.place) for cell in cells] == [
        (num, seed, place) for num in (4, 6, 10) for seed in range(3) for place in (0, 1)
    ]
    by = {(len(cell.labelled), cell.seed, cell.place): set(cell.labelled.keys) for cell in cells}
    assert all(by[num, seed, 0] == by[num, seed, 1] for num, seed, _ in by)
    assert by[4, 0, 0] != by[4, 1, 0] and by[4, 0, 0] < by[6, 0, 0]
    assert {cell.test.keys for cell in cells} == {bright_halves(4, 1).keys}


@pytest.mark.parametrize("masked", [False, True])
def test_seeds_hold_out_other_images_of_all_as_many_as_before(masked: bool) -> None:
    train, test = bright_halves(8, 0, masked), bright_halves(4, 1, masked)
    cells = [cell for cell in table(train, test, None, resplit=True).cells() if cell.place == 0]
    everything = {*train.keys, *test.keys}
    for cell in cells:
        assert (len(cell.labelled), len(cell.test)) == (8, 4)
        assert {*cell.labelled.keys, *cell.test.keys} == everything
        if not masked:
            assert sorted(cell.test.read_classes()) == [0, 0, 1, 1]
    assert len({cell.test.keys for cell in cells}) == 3
    assert cells[0].test.image(0).shape == (32, 32, 3)


def test_a_rate_that_proves_too_high_in_the_whole_training_is_followed_by_the_next_best(tmp_path: Path) -> None:
    def train(job: TuneJob, test: LabelledSet, folder: Path, what: str) -> TuneResult:
        if job.config.lr == 0.9 and "fold" not in what:
            raise DivergedError("the loss is inf")
        value = {0.1: 0.3, 0.5: 0.4, 0.9: 0.8}[job.config.lr]
        return TuneResult(folder, folder / "last.pt", 1, 1, 1, 1, 0, {}, 1.0, 1.0, {}, value=value)

    config, said = tune_config(lr_grid=(0.1, 0.5, 0.9), folds=2), list[str]()
    sets = bright_halves(8, 0), bright_halves(4, 1)
    task = find_tuned("finetune")
    result = run_cells(
        TunedTable(task, [random_arm(STUDENT)], *sets, [8], range(1), config), tmp_path, train, said.append
    )
    (score,) = result.scores
    assert (score.value, score.settings["lr"]) == (0.4, 0.5)
    assert score.settings["rates"] == {"0.1": 0.3, "0.5": 0.4, "0.9": None}
    assert score.settings["folder"].endswith("-8-0-lr0.5")
    assert "lr 0.9: the loss is inf; now lr 0.5" in said[0]
    assert RateChoice(0.1, None, ((0.1, 0.3), (0.5, None))).next_best() is None


class Shared:
    """Trainings of a stub, each held by who is at it, as the engine holds its folders; of several threads."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.met = threading.Barrier(2, timeout=60)
        self._first = threading.local()

    def __call__(self, job: TuneJob, test: LabelledSet, folder: Path, what: str) -> TuneResult:
        score = folder / "score"
        if not score.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "lock").open("w") as lock:
                try:
                    hold(lock)
                except BlockingIOError as err:
                    raise LockHeldError(str(folder)) from err
                if not score.exists():
                    self._train(job, folder, score)
        return TuneResult(folder, folder / "last.pt", 1, 1, 1, 1, 0, {}, 1.0, 1.0, {}, value=float(score.read_text()))

    def _train(self, job: TuneJob, folder: Path, score: Path) -> None:
        if not getattr(self._first, "met", False):
            self._first.met = True
            self.met.wait()  # both are at a training of their own
        time.sleep(0.002)
        self.trained.append(str(folder))
        write_whole(score, str(job.config.lr + len(job.labelled) / 100 + job.seed / 1000).encode())


def test_two_processes_share_the_trainings_of_a_table_and_each_ends_with_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtpipe.manifests.store.hold._PATIENCE_S", 0.0)
    monkeypatch.setattr("dtpipe.pipeline.tune.cells._POLL_S", 0.001)
    config = tune_config(lr_grid=(0.1, 0.5, 0.9), folds=2, lr_choice="first_seed")
    sets = bright_halves(12, 0), bright_halves(4, 1)
    arms = [random_arm(STUDENT), replace(random_arm(STUDENT), name="other")]
    whole = TunedTable(find_tuned("finetune"), arms, *sets, [8, 12], range(3), config)
    shared, said = Shared(), list[str]()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_cells, whole, tmp_path / "both", shared, said.append) for _ in range(2)]
        first, second = (run.result() for run in runs)
    alone = Shared()
    alone.met = threading.Barrier(1)
    assert first == second == run_cells(whole, tmp_path / "alone", alone, said.append)
    places = [str(Path(path).relative_to(tmp_path / "both")) for path in shared.trained]
    assert sorted(places) == sorted(str(Path(path).relative_to(tmp_path / "alone")) for path in alone.trained)
    assert len(set(places)) == len(places) == 2 * 2 * (3 * 2 + 3)  # labels, arms, rates x folds + seeds


def test_every_arm_has_a_folder_of_its_own() -> None:
    assert folder_names(["distilled", "a/b c", "a/b:c", "...", "ä=1"]) == [
        "distilled",
        "a-b-c-1",
        "a-b-c-2",
        "arm",
        "ä-1",
    ]


@pytest.mark.parametrize(
    ("tried", "sentence"),
    [
        ((), "4 labelled images are too few to choose a rate from"),
        (((0.1, 0.5), (0.2, 0.5)), "all rates score the same on the folds"),
        (((0.1, 0.5), (0.2, 0.6)), "the best rate, 0.2, is at an end of the grid"),
    ],
)
def test_choices_that_say_little_are_said(tried, sentence: str) -> None:
    config = tune_config(lr_grid=[0.1, 0.2])
    [said] = rate_notes("distilled", 4, config, RateChoice(0.2, None, tried))
    assert sentence in said
    inner = RateChoice(0.2, None, ((0.1, 0.5), (0.2, 0.6), (0.3, 0.1)))
    assert rate_notes("distilled", 4, tune_config(lr_grid=[0.1, 0.2, 0.3]), inner) == []
    assert rate_notes("distilled", 4, tune_config(), RateChoice(0.2)) == []
