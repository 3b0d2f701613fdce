"""The processes that train together, as torchrun or Ray Train starts them; one alone is the case of one rank.

What only the first rank does, such as writing, goes through `first`, and so do its errors: either all ranks go on or
all end with the same sentence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtpipe.manifests import errors
from dtpipe.manifests.errors import ConfigError, DtpipeError, IncompleteError

T = TypeVar("T")
PATIENCE = timedelta(
    hours=1
)  # longest wait for another rank: data to open, a checkpoint on a slow disk, a last picture


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    def share(self, num: int) -> range:
        """This rank's places of a global batch of `num`; shares differ by at most one."""
        return range(self.rank * num // self.size, (self.rank + 1) * num // self.size)

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network as training calls it: gradients are means over the ranks, taken with the last part of a batch."""
        if self.size == 1:
            return network
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids)

    def part(self, network: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a part's forward and backward pass: gradients stay on their rank until the last part."""
        if last or not isinstance(network, DistributedDataParallel):
            return nullcontext()
        waiting: AbstractContextManager[None] = network.no_sync()
        return waiting

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, on each."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def most(self, *values: int) -> list[int]:
        """The largest of each value over the ranks, on each."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return [int(value) for value in largest]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on each."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, call: Callable[[], T]) -> T:
        """What the first rank's call returns, on each. What it raises ends all ranks."""
        if self.size == 1:
            return call()
        result: T | None = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                result = call()
            except Exception as err:
                error = err
        failed = None if error is None else (type(error).__name__, str(error), getattr(error, "exit_code", 1))
        answer = [(result, failed)]
        dist.broadcast_object_list(answer, src=0)
        if error is not None:
            raise error
        result, failure = answer[0]
        if failure is not None:
            raise error_of_another(*failure)
        return result  # type: ignore[return-value]

    def only_first(self, call: Callable[[], T]) -> T | None:
        """As `first`, for a result that cannot be sent: None on the other ranks."""
        results: list[T] = []
        self.first(lambda: results.append(call()))
        return results[0] if results else None

    def in_turn(self, call: Callable[[], T]) -> T:
        """The result of each rank's own call; the others call after the first, and find what it left on disk."""
        result = self.only_first(call)
        return call() if self.rank else result  # type: ignore[return-value]


def error_of_another(name: str, sentence: str, exit_code: int) -> DtpipeError:
    """An error of another process, as it is raised in this one: of the same class, where it is one of dtpipe's."""
    kind = getattr(errors, name, DtpipeError)
    kind = kind if isinstance(kind, type) and issubclass(kind, DtpipeError) else DtpipeError
    error = kind(sentence)
    error.exit_code = exit_code
    return error


ALONE = Ranks()


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun's environment names, joined until the end; those that Ray Train joined; else one alone.

    Raises: ConfigError when they cannot be joined; IncompleteError when one is lost in the middle.
    """
    joined_before = dist.is_available() and dist.is_initialized()
    if not joined_before and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if not joined_before:
        _join(device)
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        yield Ranks(rank, size)
    except RuntimeError as err:  # what a broken connection raises, in gloo; NCCL's errors are RuntimeErrors too
        if not isinstance(err, dist.DistError) and "gloo" not in str(err):
            raise
        reason = str(err).splitlines()[0][:160]
        raise IncompleteError(
            f"process {rank} of {size} lost the others ({reason}); run the same command again"
        ) from err
    finally:
        if not joined_before:
            dist.destroy_process_group()


def _join(device: str) -> None:
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} of this machine has no GPU, torch sees {torch.cuda.device_count()}; "
                "start fewer processes"
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as err:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(err).splitlines()[0][:160]
        raise ConfigError(
            f"WORLD_SIZE is set, but the processes cannot meet at {where} ({reason}); start them with torchrun"
        ) from err


def ranks_of_this_machine() -> int:
    """How many processes share this machine's memory, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
