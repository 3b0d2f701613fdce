"""`dtpipe eval` of a task that trains: a table of arms, cells that are not trained twice, what is refused, its plan."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dtpipe.distill.downstream.result import ProbeResult
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.load import load_tuned
from dtpipe.distill.downstream.tuned.trainer import Tuning
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.manifests.errors import ConfigError, DtpipeError
from dtpipe.pipeline.cli.main import main
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.evaluate import evaluate
from parts.images import write_files
from parts.ranks import fork_ranks
from parts.tuning import write_halves, write_run


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    """Two arms of four images, two seeds; two rates on two folds."""
    tune = {"steps": 2, "batch_size": 4, "lr_grid": [1e-3, 1e-2], "folds": 2, "lr_choice": "first_seed"}
    return EvalConfig.model_validate(
        {
            "checkpoint": str(write_run(tmp_path / "run")),
            "task": "finetune",
            "images": str(write_halves(tmp_path / "images", 16)),
            "labelled": [4],
            "seeds": 2,
            "device": "cpu",
            "tune": {**tune, "run": {"workers": 0, "save_every": 1, "log_every": 1}},
        }
    )


def say_nothing(_sentence: str) -> None: ...


def values(result: ProbeResult) -> dict[tuple[str, int, int], tuple[float, dict[str, Any]]]:
    return {(s.extractor, s.num_labelled, s.seed): (s.value, s.settings) for s in result.scores}


def test_a_table_that_was_killed_goes_on_and_is_not_trained_twice(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the first step of the last cell, of which no checkpoint is written yet."""
    steps: list[int] = []
    updated = Tuning.updated

    def counted(trainer: Tuning, step: int) -> None:
        updated(trainer, step)
        steps.append(step)

    monkeypatch.setattr(Tuning, "updated", counted)
    whole = config.model_copy(update={"out": str(Path(config.checkpoint).with_name("whole.json"))})
    unbroken = evaluate(whole, say_nothing).result
    num_trainings = 2 * (2 + 2 * 2)  # arms; seeds, and rates on folds for the first of them
    assert len(steps) == 2 * num_trainings

    def killed(_rank: int) -> None:
        def die(trainer: Tuning, step: int) -> None:
            counted(trainer, step)
            if len(steps) == 2 * 2 * num_trainings - 1:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Tuning, "updated", die)
        evaluate(config, say_nothing)

    assert fork_ranks(killed, Path(config.checkpoint), 1) == [None]
    steps.clear()
    evaluation = evaluate(config, say_nothing)
    assert steps == [1, 2]
    assert values(evaluation.result) == values(unbroken)
    steps.clear()
    again = evaluate(config, say_nothing)
    assert (steps, again.result) == ([], evaluation.result)
    assert json.loads(evaluation.path.read_text())["task"] == "finetune"
    cell = Path(config.checkpoint) / "eval" / "finetune" / "distilled-4-1"
    assert load_tuned(cell).classes.names == ("down", "up")
    assert [line["step"] for line in read_metrics(cell)] == [1, 2]


def test_seeds_are_added_to_a_table_that_was_made_elsewhere(config: EvalConfig, tmp_path: Path) -> None:
    """With rates that it chose, so that both are the table of one."""
    test = str(write_halves(tmp_path / "test", 6, seed=1))
    config = config.model_copy(update={"test_images": test})
    whole = evaluate(config.model_copy(update={"out": str(tmp_path / "whole.json")}), say_nothing).result
    first = config.model_copy(update={"seeds": 1, "out": str(tmp_path / "first.json")})
    evaluate(first, say_nothing)
    added = {"seeds": 1, "seed": 1, "out": str(tmp_path / "both.json"), "add_to": str(tmp_path / "first.json")}
    both = evaluate(config.model_copy(update=added), say_nothing)
    assert not (tmp_path / "both" / "rates").exists()
    assert values(both.result) == values(whole)
    assert [vars(one) for one in both.result.differences()] == [vars(one) for one in whole.differences()]
    again = {**added, "seed": 2, "out": str(tmp_path / "three.json"), "add_to": str(both.path)}
    assert sorted({score.seed for score in evaluate(config.model_copy(update=again), say_nothing).result.scores}) == [
        0,
        1,
        2,
    ]
    for changes, said in (
        ({"seed": 0}, r"has seed 0 already; begin with another, as -s eval.seed=1"),
        ({"labelled": (6,)}, r"has eval.labelled \[4\], and here it is \[6\]"),
        ({"tune": added_steps(config)}, r"has eval.tune.steps 2, and here it is 3"),
        ({"compare": (f"other={write_run(tmp_path / 'other', seed=5)}",)}, r"has arms \['distilled', 'random"),
        ({"test_images": str(write_halves(tmp_path / "fewer", 4, seed=1))}, "has number of held-out images 6"),
        ({"test_images": None}, "give --test-images, and no --resplit"),
        ({"add_to": str(tmp_path / "none.json")}, "there is no such file; give the file that `dtpipe eval` wrote"),
        (
            {"add_to": str(write_files(tmp_path, {"a.json": b"{}"}) / "a.json")},
            "is no result of an evaluation .*; give",
        ),
        ({"task": "probe", "tune": None}, "eval.add_to is for the others"),
    ):
        with pytest.raises(DtpipeError, match=said):
            evaluate(config.model_copy(update={**added, **changes}), say_nothing)


def added_steps(config: EvalConfig) -> TuneConfig:
    assert config.tune is not None
    return config.tune.model_copy(update={"steps": 3})


def test_arms_are_the_run_its_random_initialisation_and_those_compared(config: EvalConfig, tmp_path: Path) -> None:
    tune = config.tune.model_copy(update={"lr_grid": ()}) if config.tune else None
    other = write_run(tmp_path / "other", seed=5)
    changes = {"tune": tune, "compare": (f"other={other}",), "labelled": (4,), "seeds": 1}
    evaluation = evaluate(config.model_copy(update=changes), say_nothing)
    assert evaluation.result.arms() == ["distilled", "random initialisation", "other"]
    assert evaluation.result.differences()[0].arm == "distilled"
    table = evaluation.result.to_table()
    assert "every arm is trained on the same labels for 2 steps, at rate 0.001" in table


def test_two_processes_make_the_table_of_one(config: EvalConfig, tmp_path: Path) -> None:
    """Without what each measures on its own images; one of them notes and writes."""
    alone = {"frozen_norms": True, "head": {"dropout": 0.0}, "lr_grid": ()}
    assert config.tune is not None
    tune = TuneConfig.model_validate(config.tune.model_dump() | alone)
    config = config.model_copy(update={"tune": tune, "seeds": 1})
    whole = config.model_copy(update={"out": str(tmp_path / "whole.json")})
    notes: list[str] = []

    def call(_rank: int) -> list[object]:
        notes.clear()
        evaluation = evaluate(config, notes.append)
        return [evaluation.rank, len(notes) > 0, [score.value for score in evaluation.result.scores]]

    expected = [score.value for score in evaluate(whole, say_nothing).result.scores]
    assert fork_ranks(call, tmp_path, 2) == [[0, True, expected], [1, False, expected]]
    assert len(list((tmp_path / "run" / "eval" / "finetune").glob("distilled-4-0/last.pt"))) == 1


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, words)])


def test_the_command_plans_what_it_would_train(config: EvalConfig) -> None:
    words = (config.checkpoint, "finetune", "--images", config.images, "--labelled", "4,all", "--seeds", 2)
    planned = run(*words, "--steps", 2, "--lr-grid", "1e-3,1e-2", "-s", "eval.tune.folds=2", "-n", "--json")
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert (plan["num_trainings"], plan["num_steps"]) == (2 * 2 * 2 * (1 + 4), 2 * 2 * 2 * 2 * (1 + 4))
    assert plan["arms"] == ["distilled", "random initialisation"] and plan["seconds"] > 0
    assert plan["head_parameters"] == 96 * 2 + 2
    assert not (Path(config.checkpoint) / "eval").exists()


def test_plan_plans_the_same_from_settings(config: EvalConfig, tmp_path: Path) -> None:
    settings = tmp_path / "eval.json"
    settings.write_text(json.dumps({"eval": config.model_dump(mode="json")}))
    planned = CliRunner().invoke(main, ["plan", "-c", str(settings), "--json"])
    assert planned.exit_code == 0, planned.output
    document = json.loads(planned.stdout)
    assert list(document) == ["eval"]
    assert document["eval"]["num_trainings"] == 2 * (2 + 2 * 2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            (),
            "nothing says how long: give --steps or --epochs, or one of the presets finetune_",
        ),
        (("--steps", 2, "--epochs", 2), "give eval.tune.steps or eval.tune.epochs, one of them"),
        (("--steps", 2, "-s", "eval.tune.augment.scale=[0.9,0.1]"), "goes from 0.9 down to 0.1; swap them"),
        (("--steps", 2, "-s", "eval.tune.augment.crop_px=[0,32]"), "should be greater than or equal to 1"),
        (("--steps", 2, "--lr", 0), "eval.tune.lr is 0: input should be greater than 0"),
    ],
)
def test_settings_that_say_too_little_or_too_much_are_refused(config: EvalConfig, words, sentence: str) -> None:
    done = run(config.checkpoint, "finetune", "--images", config.images, *words)
    assert (done.exit_code, sentence in done.output) == (2, True), done.output


def test_a_task_on_frozen_features_has_no_plan(config: EvalConfig) -> None:
    done = run(config.checkpoint, "probe", "--images", config.images, "-n")
    assert done.exit_code == 2 and "task probe trains no network" in done.output


@pytest.mark.parametrize(
    ("task", "words", "sentence"),
    [
        ("finetune", ("--steps", 2, "--teacher", "adm"), "task finetune trains backbone and head, and eval.teacher is"),
        ("probe", ("--steps", 2), "task probe reads frozen features, and eval.tune is for the others; leave it out"),
        ("finetune", ("--steps", 2, "--out", "table"), "eval.out is table, which is the folder of the trainings too"),
        (
            "finetune",
            ("--steps", 2, "--resplit", "--lr-grid", "1e-3,1e-2", "-s", "eval.tune.lr_choice=first_seed"),
            "with eval.resplit, the first seed's labelled images are held out at others",
        ),
        ("probe", ("--resplit",), "task probe reads frozen features, and eval.resplit is for the others"),
    ],
)
def test_settings_that_a_task_does_not_read_are_refused(config: EvalConfig, task: str, words, sentence: str) -> None:
    done = run(config.checkpoint, task, "--images", config.images, *words)
    assert (done.exit_code, sentence in done.output) == (2, True), done.output


def test_an_arm_cannot_have_the_name_of_the_random_initialisation(config: EvalConfig) -> None:
    twice = config.model_copy(update={"compare": (f"random initialisation={config.checkpoint}",)})
    with pytest.raises(ConfigError, match="random initialisation is the name of an arm that every table has"):
        evaluate(twice, say_nothing)


def test_published_weights_are_not_what_is_asked_about(config: EvalConfig) -> None:
    done = run("timm:resnet18", "probe", "--images", config.images)
    assert (done.exit_code, "the first arm is a run of dtpipe" in done.output) == (2, True), done.output


def test_masks_are_not_for_a_task_of_classes(config: EvalConfig) -> None:
    with pytest.raises(ConfigError, match="task finetune learns from classes; with --masks use readout, segment"):
        evaluate(config.model_copy(update={"masks": config.images}), say_nothing)
