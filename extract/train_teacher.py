"""Train a DDPM on the user's own images, to be the teacher of in-domain pre-training.

The result is a plain diffusers `DDPMPipeline` folder. Everything random is a function of (seed, step), so a run that
was stopped and started again goes the way of an unbroken one, and nothing depends on when it was stopped. Under
`torchrun` several processes share each step's batch and do together what one would do alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.extract.train_data import TrainImages, draw_batch, load_images
from dtpipe.extract.train_export import SAMPLES, export_teacher
from dtpipe.extract.train_network import noise_schedule
from dtpipe.extract.train_parallel import Ranks, join_ranks, ranks_of_this_machine
from dtpipe.extract.train_state import CHECKPOINT, TrainState, find_checkpoint, resume_or_start, save_checkpoint
from dtpipe.extract.train_step import learning_rate, train_step
from dtpipe.manifests.errors import ConfigError, StoreError
from dtpipe.manifests.stopping import StopRequest
from dtpipe.manifests.store.publish import write_whole
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.lock import Lock

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class TrainTeacherProgress:
    """Where training is, after one logged step."""

    step: int
    steps: int
    loss: float
    lr: float
    seconds: float
    throughput_img_s: float


@dataclass(frozen=True)
class TrainTeacherResult:
    """What one call did; `finished` is false when it was stopped before the last step."""

    out: Path
    step: int
    steps: int
    finished: bool
    num_images: int
    loss: float
    seconds: float
    samples: Path
    bad: tuple[str, ...] = ()
    rank: int = 0
    """Of several processes, which one this is; the first has written all there is."""


OnProgress = Callable[[TrainTeacherProgress], None]


def train_teacher(config: TrainTeacherConfig, on_progress: OnProgress | None = None) -> TrainTeacherResult:
    """Train, or go on training, and write the teacher with its sample grid into `config.out`.

    One of the processes that torchrun started does its part; `on_progress` is called in the first alone.
    Raises: PlanChangedError when `config.out` holds a teacher of other settings; LockHeldError while another run writes
    there; InputError without usable images; StoppedError after SIGTERM or SIGINT, once the state is saved.
    """
    import torch

    if config.threads:
        torch.set_num_threads(config.threads)
    with join_ranks(_device(config)) as ranks, ExitStack() as held:
        if config.batch_size < ranks.size:
            raise ConfigError(
                f"train_teacher.batch_size is {config.batch_size}, too few for {ranks.size} processes; start fewer"
            )
        lock = ranks.first(lambda: held.enter_context(_hold(config)))
        saved = find_checkpoint(config)
        images = load_images(config, ranks_of_this_machine())
        state = resume_or_start(config, ranks.device, saved, images.classes)
        return _Run(config, state, images, ranks, lock, on_progress).result()


@dataclass(frozen=True)
class _Run:
    """One call's work on a teacher."""

    config: TrainTeacherConfig
    state: TrainState
    images: TrainImages
    ranks: Ranks
    lock: Lock | None  # the first rank's
    on_progress: OnProgress | None

    def result(self) -> TrainTeacherResult:
        """Train to the end or to a stop, save, and write the teacher."""
        config, state, ranks = self.config, self.state, self.ranks
        started, out = time.monotonic(), Path(config.out)
        self._agree_on_start()
        ranks.first(lambda: drop_lines_after(out / METRICS, state.step))
        with StopRequest() as stop:
            self._train(stop)
            ranks.first(self._save)
            self._agree_to_stop(stop)
        if state.step < config.steps:
            stop.raise_if_requested(f"step {state.step} of {config.steps}", f"{out / CHECKPOINT} is saved")
        seconds = time.monotonic() - started
        ranks.first(self._export)
        return TrainTeacherResult(
            out=out,
            step=state.step,
            steps=config.steps,
            finished=state.step >= config.steps,
            num_images=len(self.images.pixels),
            loss=_mean(state.losses),
            seconds=seconds,
            samples=out / SAMPLES,
            bad=self.images.bad,
            rank=ranks.rank,
        )

    def _train(self, stop: StopRequest) -> None:
        import torch

        config, state, ranks = self.config, self.state, self.ranks
        started, first = time.monotonic(), state.step
        schedule = torch.from_numpy(noise_schedule(config)).to(ranks.device)
        state.forward = ranks.wrap(state.unet)
        part = ranks.part(config.batch_size)
        with ThreadPoolExecutor(1, thread_name_prefix="batch") as ahead:
            coming = ahead.submit(draw_batch, config, self.images, state.step, part)
            while state.step < config.steps and not self._agree_to_stop(stop, time.monotonic() - started):
                batch = coming.result()
                coming = ahead.submit(draw_batch, config, self.images, state.step + 1, part)
                state.losses = [*state.losses[-199:], train_step(config, state, batch, schedule, ranks)]
                if state.step % config.log_every == 0 or state.step == config.steps:
                    self._report(time.monotonic() - started, state.step - first)
                if state.step % config.checkpoint_every == 0:
                    ranks.first(self._save)

    def _report(self, seconds: float, num_steps: int) -> None:
        config, state = self.config, self.state
        progress = TrainTeacherProgress(
            step=state.step,
            steps=config.steps,
            loss=_mean(state.losses[-config.log_every :]),
            lr=learning_rate(config, state.step - 1),
            seconds=seconds,
            throughput_img_s=num_steps * config.batch_size / seconds,
        )
        self.ranks.first(lambda: _log(Path(config.out) / METRICS, progress))
        if self.on_progress and self.ranks.rank == 0:
            self.on_progress(progress)

    def _save(self) -> None:
        assert self.lock is not None
        self.lock.check()
        save_checkpoint(self.config, self.state)

    def _export(self) -> None:
        assert self.lock is not None
        self.lock.check()
        export_teacher(Path(self.config.out), Path(self.config.out), device=self.ranks.device)

    def _agree_on_start(self) -> None:
        """All ranks read the same folder, or the steps they take are not one run."""
        seen = self.ranks.gather((self.state.step, len(self.images.pixels)))
        if len(set(seen)) > 1:
            raise ConfigError(
                f"{self.config.out}: the processes found different checkpoints or images (step, images: {seen}); "
                "--out and --images must be folders that all machines share"
            )

    def _agree_to_stop(self, stop: StopRequest, seconds: float = 0.0) -> bool:
        """True on all ranks, in the same step, once one got a signal or the time is over."""
        late = self.config.max_hours is not None and seconds > self.config.max_hours * 3600
        asked = self.ranks.gather((stop.signal, late))
        if not stop.requested and (number := next((number for number, _ in asked if number), None)):
            stop.request(number)
        return stop.requested or any(late for _, late in asked)


def _hold(config: TrainTeacherConfig) -> Lock:
    """The right to write the folder, which is made if need be."""
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise StoreError(f"{out}: cannot make the folder ({err}); name another --out") from err
    return Lock.acquire(Store(out))


def drop_lines_after(path: Path, step: int) -> None:
    """Forget lines of steps that a resumed run takes again, and one that a kill cut short."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline was not written whole
    kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
    try:
        write_whole(path, "".join(f"{line}\n" for line in kept))
    except OSError as err:
        raise _unwritable(path, err) from err


def _step_of(line: str) -> int | None:
    """The step of a line; None where two lines ran into one, as an append after a kill leaves them."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def _log(path: Path, progress: TrainTeacherProgress) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(progress)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as err:
        raise _unwritable(path, err) from err


def _unwritable(path: Path, err: OSError) -> StoreError:
    return StoreError(f"{path}: cannot write ({err}); make room and run the same command again")


def _mean(losses: list[float]) -> float:
    return sum(losses) / len(losses) if losses else float("nan")


def _device(config: TrainTeacherConfig) -> str:
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train_teacher.device is cuda, but torch sees no GPU; use auto or cpu")
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if config.precision == "float16" and device == "cpu":
        raise ConfigError("train_teacher.precision is float16, which trains on a GPU only; use bfloat16 or float32")
    return device
