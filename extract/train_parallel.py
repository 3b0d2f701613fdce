"""Several processes that train one teacher, as `torchrun` starts them: each computes its part of every global batch.

A process alone is the case of one rank, so the training loop has one form. What only the first rank does, such as
writing, goes through `first`, and so do its errors: either all ranks go on or all end with the same sentence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dtpipe.manifests.errors import ConfigError, DtpipeError, IncompleteError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
PATIENCE = timedelta(hours=1)  # longest wait for another rank: decoding all images, or the sample grid


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def part(self, num: int) -> range:
        """This rank's places of a global batch of `num`; parts differ by at most one."""
        return range(self.rank * num // self.size, (self.rank + 1) * num // self.size)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as training calls it: its gradients are means over the ranks."""
        if self.size == 1:
            return network
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(network)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks; changes it in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(value)
        return value

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on each."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, call: Callable[[], T]) -> T | None:
        """Do something on the first rank while the others wait; None on those. What it raises ends all ranks."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = call()
            except Exception as err:
                error = err
        if self.size > 1:
            failed = self.gather((str(error), getattr(error, "exit_code", 1)) if error else None)[0]
            if failed and error is None:
                told = DtpipeError(failed[0])
                told.exit_code = failed[1]
                raise told
        if error is not None:
            raise error
        return result


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun's environment names, joined until the end; one rank without torchrun.

    Raises: ConfigError when they cannot be joined; IncompleteError when one is gone in the middle.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(device=device)
        return
    import torch.distributed as dist

    ranks = _join(device)
    try:
        yield ranks
    except RuntimeError as err:  # what a broken connection raises, in gloo; NCCL's errors are RuntimeErrors too
        if not isinstance(err, dist.DistError) and "gloo" not in str(err):
            raise
        raise IncompleteError(
            f"process {ranks.rank} of {ranks.size} lost the others ({str(err).splitlines()[0][:160]}); run the same command again"
        ) from err
    finally:
        dist.destroy_process_group()


def _join(device: str) -> Ranks:
    import torch
    import torch.distributed as dist

    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} of this machine has no GPU, torch sees {torch.cuda.device_count()}; start fewer processes"
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as err:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(err).splitlines()[0][:160]
        raise ConfigError(
            f"WORLD_SIZE is set, but the processes cannot meet at {where} ({reason}); start them with torchrun"
        ) from err
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def ranks_of_this_machine() -> int:
    """How many processes share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
