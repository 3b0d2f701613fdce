"""The guarantees of the engine, on a trainer that is neither of features nor of diffusion."""

from __future__ import annotations

import ast
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtpipe.distill.engine import loop
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.loop import Loop
from dtpipe.distill.engine.optim import build_optimizer
from dtpipe.distill.engine.progress import TrainProgress
from dtpipe.distill.engine.run_folder import read_config, read_metrics
from dtpipe.manifests.errors import ConfigError, DivergedError, LockHeldError, PlanChangedError, StoppedError
from parts.line import KIND, Line, LineConfig, fit
from parts.paths import REPO
from parts.ranks import fork_ranks
from parts.runs import assert_equal_checkpoints
from parts.settings import build, changed


@pytest.fixture
def config(tmp_path: Path) -> LineConfig:
    return build(LineConfig, {"out": str(tmp_path / "run")})


def losses(config: LineConfig) -> list[float]:
    lines = read_metrics(Path(config.run.out))
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def saved(config: LineConfig) -> dict[str, Any]:
    return load_checkpoint(Path(config.run.out) / "last.pt", KIND)


def at(step: int, do: Callable[[], object], rank: str = "0") -> Callable[[int], None]:
    """Something that one rank does after a step, before it is reported and saved."""

    def after(now: int) -> None:
        if now == step and os.environ.get("RANK", "0") == rank:
            do()

    return after


def test_the_engine_imports_nothing_of_what_it_trains():
    for path in (REPO / "distill" / "engine").glob("*.py"):
        modules = [
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        own = [module for module in modules if module.startswith("dtpipe.")]
        assert all(f"{module}.".startswith(("dtpipe.distill.engine.", "dtpipe.manifests.")) for module in own), path


def test_a_run_fits_reports_and_leaves_its_folder(config):
    result = fit(changed(config, num_steps=200, num_kept=2, save_every=60, log_every=50))
    lines = read_metrics(result.run_dir)
    assert [line["step"] for line in lines] == [50, 100, 150, 200]
    assert lines[-1]["loss"] < 1e-3 * lines[0]["loss"]
    assert (lines[0]["epoch"], lines[-1]["epoch"], lines[-1]["num_epochs"]) == (15, 60, 60)
    assert result.losses == {name: lines[-1][name] for name in ("loss", "bias")}
    assert (result.step, result.num_steps, result.resumed_step, result.num_samples) == (200, 200, 0, 20)
    assert read_config(result.run_dir, kind=KIND)["num_steps"] == 200
    assert sorted(path.name for path in (result.run_dir / "checkpoints").iterdir()) == [
        "epoch-00002.pt",
        "epoch-00003.pt",
    ]
    assert load_checkpoint(result.run_dir / "checkpoints" / "epoch-00003.pt", KIND)["step"] == 180


def test_advice_is_given_of_reports_that_span_several_steps_alone(config):
    """The first of few steps waits for what later ones find ready."""
    fit(changed(config, num_steps=13, log_every=6))
    assert [(line["step"], line.get("advice")) for line in read_metrics(Path(config.run.out))] == [
        (6, "read faster"),
        (12, "read faster"),
        (13, None),
    ]


def test_a_finished_run_is_left_alone(config):
    first = fit(config)
    before = first.checkpoint.read_bytes()
    again = fit(config)
    assert (again.resumed_step, again.losses) == (12, first.losses)
    assert first.checkpoint.read_bytes() == before


def test_a_killed_process_goes_on_bit_for_bit_and_reports_each_step_once(config, tmp_path):
    """Killed two steps after a save; dropout draws random numbers in each step."""
    config = changed(config, dropout=0.3)
    whole = changed(config, out=str(tmp_path / "whole"))
    fit(whole)
    kill = at(6, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert fork_ranks(lambda _: fit(config, kill), tmp_path, 1) == [None]
    assert [line["step"] for line in read_metrics(Path(config.run.out))] == [1, 2, 3, 4, 5]
    with (Path(config.run.out) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert fit(config).resumed_step == 4
    assert_equal_checkpoints(Path(whole.run.out) / "last.pt", Path(config.run.out) / "last.pt", KIND)
    assert losses(config) == losses(whole)


def test_micro_batches_take_the_steps_of_whole_batches(config, tmp_path):
    fit(config)
    whole = changed(config, out=str(tmp_path / "whole"), micro_batch=6)
    fit(whole)
    np.testing.assert_allclose(losses(config), losses(whole), rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_take_the_steps_of_one(config, tmp_path, size):
    one = changed(config, out=str(tmp_path / "one"))
    fit(one)
    assert fork_ranks(lambda _: fit(config).step, tmp_path, size) == [12] * size
    np.testing.assert_allclose(losses(config), losses(one), rtol=1e-4)


def test_a_signal_to_any_process_stops_all_and_the_run_goes_on_with_another_number_of_them(config, tmp_path):
    one = changed(config, out=str(tmp_path / "one"))
    fit(one)
    stop = at(3, lambda: signal.raise_signal(signal.SIGTERM), rank="1")
    sentence = f"step 3 of 12: stopped by SIGTERM; {config.run.out}/last.pt is saved, run the same command to go on"
    assert fork_ranks(lambda _: fit(config, stop), tmp_path, 2) == [["StoppedError", sentence, 143]] * 2
    stop = at(7, lambda: signal.raise_signal(signal.SIGINT), rank="2")
    assert [answer[2] for answer in fork_ranks(lambda _: fit(config, stop), tmp_path, 3)] == [130] * 3
    assert fit(config).resumed_step == 7
    np.testing.assert_allclose(losses(config), losses(one), rtol=1e-4)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops_with_its_exit_code(config, number, code):
    with pytest.raises(StoppedError, match="step 2 of 12: stopped by") as error:
        fit(config, at(2, lambda: signal.raise_signal(number)))
    assert error.value.exit_code == code
    assert saved(config)["step"] == 2


def test_a_signal_in_the_last_step_is_no_error(config):
    assert fit(config, at(12, lambda: signal.raise_signal(signal.SIGTERM))).step == 12


def test_a_process_that_is_gone_ends_the_others_and_the_run_goes_on_from_its_checkpoint(config, tmp_path):
    kill = at(6, lambda: os.kill(os.getpid(), signal.SIGKILL), rank="1")
    answer, none = fork_ranks(lambda _: fit(config, kill), tmp_path, 2)
    assert none is None
    assert answer[0] == "IncompleteError"
    assert answer[1].startswith("process 0 of 2 lost the others")
    assert fit(config).resumed_step == 4


def test_a_time_limit_stops_without_an_error_and_the_run_goes_on(config, tmp_path):
    fit(changed(config, out=str(tmp_path / "whole")))
    first = fit(changed(config, max_s=0))
    assert (first.step, saved(config)["step"]) == (1, 1)
    assert fit(config).resumed_step == 1
    assert_equal_checkpoints(tmp_path / "whole" / "last.pt", Path(config.run.out) / "last.pt", KIND)


def test_the_time_that_is_left_ends_at_the_time_limit_and_says_at_which_step(config):
    said = []

    def slow(_step: int) -> None:
        time.sleep(0.02)

    fit(changed(config, max_s=0.12), slow, said.append)
    first = said[0]
    assert 0 < first.remaining_s <= 0.12 and 1 < first.limit_step < first.num_steps
    whole = []
    fit(changed(config, max_s=1000), slow, whole.append)
    assert {progress.limit_step for progress in whole} == {None} and whole[-1].remaining_s == 0


def test_a_loss_that_is_not_finite_names_its_samples_on_all_ranks_and_spoils_no_weights(config, tmp_path):
    """The bad row is first drawn in step 2."""
    first = {key for part in Line(changed(config, num_steps=1)).batches(0) for key in part.keys}
    second = [part.keys for part in Line(changed(config, num_steps=2)).batches(1)]
    keys, key = next((keys, key) for keys in second for key in keys if key not in first)
    wild = changed(config, poisoned=int(key.removeprefix("row ")), save_every=1)
    with pytest.raises(DivergedError) as error:
        fit(wild)
    assert str(error.value) == (
        f"the loss is nan in step 2, in a batch of {', '.join(keys)}; last.pt holds an earlier step: straighten it"
    )
    assert saved(wild)["step"] == 1
    answers = fork_ranks(lambda _: fit(changed(wild, out=str(tmp_path / "two"))), tmp_path, 2)
    assert answers[0] == answers[1]
    assert answers[0][0] == "DivergedError"
    assert answers[0][2] == 9
    assert key in answers[0][1]


def test_a_gradient_that_is_not_finite_names_the_batch(config):
    line = Line(config)
    line.model[1].weight.register_hook(lambda gradient: gradient * torch.inf)
    before = line.model[1].weight.clone()
    with pytest.raises(DivergedError, match=r"the gradient's norm is .* in a batch of row \d+, (row \d+, ){4}row \d+;"):
        next(Loop(line).steps())
    assert torch.equal(line.model[1].weight, before)


def test_gradients_are_clipped_to_the_norm_and_reported_before(config):
    line = Line(changed(config, clip_grad=1e-3))
    norms = []
    line.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.cat([p.grad.flatten() for p in line.model.parameters()]).norm().item())
    )
    loop = Loop(line)
    next(loop.steps())
    assert norms == [pytest.approx(1e-3, rel=1e-3)]
    assert loop.grad_norm > 1e-2


def lamb_by_hand(start: np.ndarray, gradients: list[np.ndarray], rates: list[float], largest: float) -> np.ndarray:
    """One matrix, decay 0.1, betas 0.9 and 0.95, eps 1e-6; clipping, then You et al., arXiv 1904.00962, in float64."""
    weights, mean, square = start.astype(np.float64), 0.0, 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        gradient = gradient / max(1.0, np.linalg.norm(gradient) / largest)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
        update = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.95**step)) + 1e-6) + 0.1 * weights
        weights = weights - rate * np.linalg.norm(weights) / np.linalg.norm(update) * update
    return weights


@pytest.mark.parametrize(("clip_grad", "largest"), [(None, 1.0), (5.0, 5.0), (0.5, 0.5)])
def test_lamb_clips_once_to_the_norm_asked_for_and_else_to_timms_one(config, clip_grad, largest):
    """The gradient is whole when LAMB gets it, and its steps are those of a gradient clipped to the one norm."""
    line = Line(changed(config, clip_grad=clip_grad, lr=0.3))
    line.model[1].bias.requires_grad_(False)
    line.optimizer = build_optimizer(line.model[1], "lamb", 0.3, 0.1, (0.9, 0.95))
    weight = line.model[1].weight
    start, gradients = weight.detach().numpy().copy(), []
    line.optimizer.register_step_pre_hook(lambda *_: gradients.append(weight.grad.numpy().astype(np.float64)))
    loop = Loop(line)
    norms = [loop.grad_norm for _ in loop.steps()]
    assert min(norms) < 5 < max(norms)  # so that each limit gives other steps
    assert norms == pytest.approx([np.linalg.norm(gradient) for gradient in gradients], rel=1e-5)
    by_hand = lamb_by_hand(start, gradients, [line.learning_rate(step) for step in range(len(norms))], largest)
    np.testing.assert_allclose(weight.detach(), by_hand, rtol=1e-4)  # float32 over twelve steps


def test_an_overflow_in_float16_leaves_the_weights_and_lowers_the_scale(config):
    line = Line(config)
    loop = Loop(line)
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # no gradient of this line fits
    before = line.model[1].weight.clone()
    next(loop.steps())
    assert loop.step == 1
    assert loop.scaler.get_scale() == 2.0**126
    assert torch.equal(line.model[1].weight, before)
    line.model[1].bias.data.fill_(torch.nan)  # which no scale mends
    with pytest.raises(DivergedError, match="the loss is nan in step 1"):
        next(Loop(line).steps())


class Half(Line):
    """Precision is the trainer's own affair; the loop scales the loss for it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.course = replace(self.course, precision=torch.float16)


def test_a_step_that_overflows_is_reported_with_the_norm_before_it(config, monkeypatch):
    """A gradient that is not finite fits no line of metrics."""
    monkeypatch.setattr("parts.line.Line", Half)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **b: scaler(*a, **b, init_scale=2.0**127))
    fit(changed(config, num_steps=8))
    norms = [line["grad_norm"] for line in read_metrics(Path(config.run.out))]
    assert norms[0] == 0  # 2**127 overflows; a few halvings later nothing does
    assert norms[-1] > 0


def test_a_loss_that_is_not_finite_ends_all_ranks_in_float16_too(config, tmp_path, monkeypatch):
    """The other rank sees gradients that might come from an overflow."""
    monkeypatch.setattr("parts.line.Line", Half)
    wild = changed(config, poisoned=3, num_steps=40)
    answers = fork_ranks(lambda _: fit(wild).step, tmp_path, 2)
    assert answers[0] == answers[1]
    assert answers[0][0] == "DivergedError"
    assert "the loss is nan" in answers[0][1] and "row 3" in answers[0][1]


def test_the_scale_of_float16_goes_on_where_it_was(config, monkeypatch):
    scales = []
    monkeypatch.setattr("parts.line.Line", Half)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *a, **b: scales.append(scaler(*a, **b, growth_interval=3)) or scales[-1]
    )
    fit(changed(config, num_steps=4))
    assert scales[-1].get_scale() == 2.0**17  # doubled after three steps
    fit(changed(config, num_steps=4))
    assert scales[-1].get_scale() == 2.0**17


def test_a_folder_has_one_writer(config):
    seen = []

    def second() -> None:
        with pytest.raises(LockHeldError, match="another process trains in this folder"):
            fit(config)
        seen.append(2)

    assert fit(config, at(2, second)).step == 12
    assert seen == [2]


def test_a_run_whose_lock_was_removed_writes_no_checkpoint(config):
    with pytest.raises(LockHeldError, match="somebody removed this run's lock"):
        fit(config, at(2, (Path(config.run.out) / ".lock").unlink))
    assert not (Path(config.run.out) / "last.pt").exists()
    assert fit(config).step == 12


def test_an_error_of_the_first_process_is_everyones(config, tmp_path):
    fit(config)
    answers = fork_ranks(lambda _: fit(changed(config, lr=0.5)), tmp_path, 2)
    assert answers[0] == ["PlanChangedError", answers[0][1], 2]
    assert answers[1][1:] == answers[0][1:]
    assert "line.lr: 0.02 -> 0.5" in answers[0][1]


def test_a_checkpoint_of_other_data_is_refused_before_anything_is_restored(config):
    fit(config, identity={"classes": ["cat", "dog"]})
    with pytest.raises(PlanChangedError, match=r'last\.pt was trained on other data \(classes.*"dog".* -> .*"hound"'):
        fit(config, identity={"classes": ["cat", "hound"]})


def test_a_fresh_run_is_refused_where_one_is(config):
    fit(config, fresh=True)
    with pytest.raises(ConfigError, match="already holds a run"):
        fit(config, fresh=True)


def test_progress_is_told_by_the_first_process_alone(config, tmp_path):
    def call(rank: int) -> list[int]:
        steps: list[int] = []
        fit(changed(config, log_every=5), on_progress=lambda progress: steps.append(progress.step))
        return steps

    first, second = fork_ranks(call, tmp_path, 2)
    assert {5, 10, 12} <= set(first)  # and others, where steps are slow
    assert second == []
    records = [json.loads(text) for text in (Path(config.run.out) / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [5, 10, 12]


def test_slow_steps_are_told_of_between_lines_of_the_log(config, monkeypatch):
    monkeypatch.setattr(loop, "TELL_EVERY_S", 0.0)
    told: list[TrainProgress] = []
    fit(changed(config, log_every=5), on_progress=told.append)
    assert [progress.step for progress in told] == list(range(1, 13))
    records = read_metrics(Path(config.run.out))
    assert [record["step"] for record in records] == [5, 10, 12]
    assert {record["step"]: record["loss"] for record in records} == {
        progress.step: progress.losses["loss"] for progress in told if progress.step in (5, 10, 12)
    }
