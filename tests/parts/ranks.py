"""Processes that train together, as forks of a test."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.nn.parallel import distributed  # noqa: F401  imported once, not in each fork

from dtpipe.manifests.errors import DtpipeError

# Autograd starts its threads at the first backward pass, none where that is on the CPU and before dynamo's or a fake
# device's; a fork of a process that has some refuses all backward passes.
torch.ones(1, requires_grad=True).sum().backward()


def fork_ranks(call: Callable[[int], Any], folder: Path, size: int) -> list[Any]:
    """What `call(rank)` returns in each of `size` processes, or its error's type, sentence and exit code; None if it
    was killed.
    """
    # As under torchrun, the parent holds the port, so that nothing else can take it before rank 0 does.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = [folder / f"rank{rank}.json" for rank in range(size)]
    pids = []
    for rank, answer in enumerate(answers):
        answer.unlink(missing_ok=True)
        pid = os.fork()
        if not pid:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
            _answer(call, rank, answer)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return [json.loads(answer.read_text()) if answer.exists() else None for answer in answers]


def _answer(call: Callable[[int], Any], rank: int, answer: Path) -> None:
    try:
        torch.set_num_threads(1)
        answer.write_text(json.dumps(call(rank)))
    except DtpipeError as err:
        answer.write_text(json.dumps([type(err).__name__, str(err), err.exit_code]))
    except BaseException:
        traceback.print_exc()  # the one who asked only sees that there is no answer
    finally:
        os._exit(0)
