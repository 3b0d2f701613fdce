"""Distillation on the engine: gradients add up, runs resume bit for bit, signals and divergence leave a usable run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import yaml

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.loop import Loop
from dtpipe.distill.engine.progress import TrainProgress
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.stream.data import OpenedData
from dtpipe.distill.stream.order import StreamPosition
from dtpipe.distill.stream.stream import FeatureStream
from dtpipe.distill.student.distiller import build_distiller
from dtpipe.distill.student.load import load_student
from dtpipe.distill.trainer import Distillation, waiting_advice
from dtpipe.manifests.codecs.base import SYMBOLS
from dtpipe.manifests.errors import ConfigError, DivergedError, PlanChangedError, StoppedError
from parts.memory import FLIPPED_VIEWS, PX, MemorySource, tiny_config
from parts.runs import assert_equal_checkpoints, train_on
from parts.settings import changed

CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


@pytest.mark.parametrize("changes", [{}, {"opt": "lamb", "ema_decay": 0.9}])
def test_a_killed_and_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path, changes):
    """Killed in mid-epoch after a save, two steps later than the save."""
    data = OpenedData(MemorySource(views=FLIPPED_VIEWS), (PX, PX), "0" * 64)
    config = tiny_config(tmp_path / "whole", epochs=3, log_every=1, **changes)
    train_on(data, config)

    def kill(progress: TrainProgress) -> None:
        if progress.step == 6:
            raise Killed

    broken = changed(config, out=str(tmp_path / "broken"), save_every_s=1e-9)
    with pytest.raises(Killed):
        train_on(data, broken, kill)
    assert load_checkpoint(tmp_path / "broken" / "last.pt", "distill")["step"] == 5
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')
    result = train_on(data, broken)
    assert result.resumed_step == 5
    assert_equal_checkpoints(tmp_path / "whole" / "last.pt", tmp_path / "broken" / "last.pt")
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("whole", "broken")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9


def test_a_run_whose_checkpoint_is_of_the_first_format_goes_on_bit_for_bit(tmp_path, data):
    """The step stood in `scheduler` and, as epoch and batch, in `stream`; settings had no halves."""
    config = tiny_config(tmp_path / "whole", epochs=3, log_every=1)
    train_on(data, config)
    old = changed(config, out=str(tmp_path / "old"))
    with pytest.raises(StoppedError):
        train_on(data, old, lambda progress: os.kill(os.getpid(), signal.SIGTERM) if progress.step == 4 else None)
    state = load_checkpoint(tmp_path / "old" / "last.pt", "distill")
    assert state.pop("step") == 4
    for name in ("kind", "scaler"):
        del state[name]
    first = {"scheduler": {"step": 4, "num_steps": 9, "num_warmup": 2}, "stream": {"epoch": 1, "batch_idx": 1}}
    torch.save({**state, **first, "format": "dtpipe-run/1"}, tmp_path / "old" / "last.pt")
    settings = old.model_dump(mode="json")
    flat = settings | settings.pop("run")
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump({"distill": flat}))
    assert train_on(data, old).resumed_step == 4
    assert_equal_checkpoints(tmp_path / "whole" / "last.pt", tmp_path / "old" / "last.pt")


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path, data):
    """With group norm only; the student here has layer norms."""
    gradients = []
    for micro in (None, 3, 1):
        config = tiny_config(
            tmp_path, student={"name": "test_convnext"}, micro_batch=micro, regressor={"width": 8, "norm": "group"}
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trainer = Distillation(config, data, CPU)
        for batch in trainer.batches(0):
            (trainer.losses(batch)["loss"] * batch.weight).backward()
            if batch.last:
                break
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    scale = gradients[0].abs().max()
    for parts in gradients[1:]:
        assert (parts - gradients[0]).abs().max() < 1e-5 * scale  # float32 sums in another order


def test_ranks_give_the_gradient_of_the_whole_batch_also_where_the_tail_leaves_some_without_samples(tmp_path):
    """9 good rows in batches of 8 on 3 ranks: the tail is one sample, so two ranks have none."""
    source = MemorySource(num_rows=10)
    config = tiny_config(tmp_path, student={"name": "test_convnext"}, regressor={"width": 8, "norm": "group"}, epochs=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer = Distillation(config, OpenedData(source, (PX, PX), "0" * 64), CPU)

    def gradients(rank: int, world: int) -> list[torch.Tensor]:
        """Of each global batch."""
        stream = FeatureStream(source, replace(trainer.stream.settings, rank=rank, world=world), CPU)
        found = []
        for batch in stream.batches(StreamPosition()):
            loss = trainer.losses(batch)["loss"]
            assert loss.isfinite()
            (loss * batch.weight).backward()
            if batch.last:
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.model.parameters()]
                found.append(torch.cat([grad.flatten() for grad in grads]))
                trainer.optimizer.zero_grad(set_to_none=True)
        return found

    whole, ranks = gradients(0, 1), [gradients(rank, 3) for rank in range(3)]
    assert [len(each) for each in [whole, *ranks]] == [2, 2, 2, 2]  # every rank takes the same steps
    assert not ranks[1][1].any()
    for expected, *parts in zip(whole, *ranks, strict=True):
        assert (sum(parts) - expected).abs().max() < 1e-5 * expected.abs().max()  # float32 sums in another order


def test_training_lowers_the_loss_and_says_where_the_time_went(tmp_path, data):
    result = train_on(data, tiny_config(tmp_path, epochs=12, batch_size=19, micro_batch=None, lr=4e-3, log_every=1))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["mse"] + 10 * line["at"], rel=1e-5)
        assert line["mse"] == pytest.approx(np.mean([line[f"mse/{name}"] for name in ("l2", "l3", "l4")]), rel=1e-5)
        assert sum(value for name, value in line.items() if name.startswith("share/")) == pytest.approx(1, abs=1e-3)
    assert set(result.shares) == {"data", "transfer", "model", "optimiser", "save"}
    assert (result.num_steps, result.num_samples, result.flips) == (12, 19, False)
    assert result.losses["loss"] == lines[-1]["loss"]


def test_a_finished_run_is_left_alone(tmp_path, data):
    config = tiny_config(tmp_path, epochs=1)
    first = train_on(data, config)
    before = first.checkpoint.read_bytes()
    again = train_on(data, config)
    assert (again.resumed_step, again.losses) == (again.num_steps, first.losses)
    assert first.checkpoint.read_bytes() == before


def test_the_student_of_a_run_loads_and_is_the_average_with_ema(tmp_path, data):
    train_on(data, tiny_config(tmp_path, ema_decay=0.5))
    state = load_checkpoint(tmp_path / "last.pt", "distill")
    student = load_student(tmp_path)
    name = "net.layer1.0.conv1.weight"
    assert torch.equal(student.state_dict()[name], state["ema"][name])
    assert not torch.equal(state["student"][name], state["ema"][name])
    assert student.spec.image_px == (PX, PX)


def test_epoch_ends_are_kept(tmp_path, data):
    train_on(data, tiny_config(tmp_path, epochs=4, keep_checkpoints=2))
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*")) == ["epoch-00003.pt", "epoch-00004.pt"]


def test_other_data_in_a_resumed_run_is_refused(tmp_path, data):
    config = tiny_config(tmp_path, epochs=1)
    train_on(data, config)
    with pytest.raises(PlanChangedError, match="trained on other data"):
        train_on(replace(data, digest="1" * 64), config)


def test_a_loss_that_is_not_finite_names_the_samples_and_spoils_no_weights(tmp_path, data):
    trainer = Distillation(tiny_config(tmp_path, micro_batch=None), data, CPU)
    good = data.source.read

    def poisoned(rows, names, views, images=True):
        pixels, coded = good(rows, names, views, images)
        coded.pieces["l3"][0].parts[SYMBOLS][0] = np.nan
        return pixels, coded

    data.source.read = poisoned
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    keys = next(trainer.batches(0)).keys
    with pytest.raises(DivergedError, match="the loss is nan in step 1") as error:
        next(Loop(trainer).steps())
    assert all(key in str(error.value) for key in keys)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def test_a_tail_of_one_sample_trains(tmp_path):
    source = MemorySource(num_rows=10)
    assert len(source.columns.ok_rows) == 9  # a batch of 8, then one sample
    result = train_on(OpenedData(source, (PX, PX), "0" * 64), tiny_config(tmp_path, epochs=1))
    assert result.num_steps == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops_with_its_exit_code(tmp_path, data, number, code):
    config = tiny_config(tmp_path, epochs=3, log_every=1)

    def interrupt(progress: TrainProgress) -> None:
        if progress.step == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(
        StoppedError, match=r"step 2 of 9: stopped by .*last\.pt is saved, run the same command to go on"
    ) as error:
        train_on(data, config, interrupt)
    assert error.value.exit_code == code
    assert load_checkpoint(tmp_path / "last.pt", "distill")["step"] == 2
    assert train_on(data, config).resumed_step == 2


def test_training_leaves_the_global_generator_alone(tmp_path, data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_on(data, tiny_config(tmp_path, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_differ(tmp_path, data):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_on(data, tiny_config(tmp_path / name, epochs=1, seed=seed))
    assert_equal_checkpoints(tmp_path / "a" / "last.pt", tmp_path / "b" / "last.pt")
    with pytest.raises(AssertionError):
        assert_equal_checkpoints(tmp_path / "a" / "last.pt", tmp_path / "c" / "last.pt")


def test_the_config_of_a_run_makes_the_run_again(tmp_path, data):
    train_on(data, tiny_config(tmp_path, epochs=1))
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert DistillConfig(**written["distill"]) == tiny_config(tmp_path, epochs=1)


def test_config_needs_no_torch():
    code = "import sys; import dtpipe.distill.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch hides it where it is but shown
def test_channels_last_and_compiled_training_take_the_same_steps(tmp_path, data, monkeypatch):
    """Compiled as on a GPU but for the last stage, which writes C++ for minutes here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses = {}
    for name, changes in {"plain": {"channels_last": False}, "last": {}, "compiled": {"compile": True}}.items():
        train_on(data, tiny_config(tmp_path / name, epochs=1, log_every=1, **changes))
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name)]
    assert losses["last"] == pytest.approx(losses["plain"], rel=1e-4)  # float32 sums in another order
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)
    assert load_student(tmp_path / "compiled").spec.name == "test_resnet"


def test_synchronised_norms_are_refused_without_a_gpu(tmp_path, data):
    with pytest.raises(ConfigError, match="sync_bn needs GPUs"):
        Distillation(tiny_config(tmp_path, sync_bn=True), data, CPU)


def test_parts_of_one_sample_per_device_are_refused_with_batch_norm(tmp_path, data):
    with pytest.raises(ConfigError, match="micro-batches of 2 or more on each device"):
        build_distiller(
            tiny_config(tmp_path, micro_batch=None), data.source.levels, (PX, PX), num_ranks=5
        )  # 8 samples: 2, 2, 2, 1, 1


@pytest.mark.parametrize(
    ("waiting", "threads", "expected"),
    [
        (0.05, 1, None),
        (
            0.0501,
            1,
            f"5% of the time goes by waiting for data: raise distill.run.read_threads from 1 to up to {os.cpu_count()}",
        ),
        (
            0.4,
            10_000,
            "40% of the time goes by waiting for data: raise distill.run.prefetch from 4, "
            "or bring the dataset to a faster disk",
        ),
    ],
)
def test_more_than_five_percent_of_waiting_says_what_to_change(waiting, threads, expected):
    assert waiting_advice({"data": waiting, "model": 1 - waiting}, threads, 4) == expected
