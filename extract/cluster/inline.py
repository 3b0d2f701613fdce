"""Extraction inside this process, for one GPU or for debugging: the same worker, fed by two threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from dtpipe.extract.shards.progress import ProgressMeter
from dtpipe.extract.shards.queue import SHARDS_IN_HAND, ShardQueue, ShardTask
from dtpipe.extract.shards.task import ShardDroppedError, ShardSummary, summarize
from dtpipe.extract.shards.worker import ShardWorker
from dtpipe.manifests.schema import ShardEntry
from dtpipe.manifests.stopping import StopRequest

_TICK_S = 0.5
HERE = "worker in this process"


def run_inline(
    worker: ShardWorker,
    queue: ShardQueue,
    meter: ProgressMeter,
    on_shard: Callable[[ShardSummary], None],
    stop: StopRequest,
) -> None:
    """Extract the shards of a queue; returns when none is left or a stop was obeyed. Deadlines are not enforced here.

    Raises: what `ShardQueue.fail` raises.
    """
    meter.workers = 1
    meter.worker_ready()
    in_hand: dict[Future[ShardEntry], ShardTask] = {}
    with ThreadPoolExecutor(SHARDS_IN_HAND, thread_name_prefix="shard") as pool:
        try:
            while in_hand or (len(queue) and not stop.requested):
                _feed(worker, queue, in_hand, pool, stop)
                if not in_hand:
                    time.sleep(_TICK_S / 5)  # every shard left is pausing after a failure
                    continue
                done, _ = wait(in_hand, timeout=_TICK_S, return_when=FIRST_COMPLETED)
                for future in done:
                    _answer(future, in_hand.pop(future), queue, meter, on_shard)
                meter.encoded(worker.num_encoded, {HERE: worker.stalls()})
                meter.report()
        finally:
            worker.request_stop()


def _feed(
    worker: ShardWorker,
    queue: ShardQueue,
    in_hand: dict[Future[ShardEntry], ShardTask],
    pool: ThreadPoolExecutor,
    stop: StopRequest,
) -> None:
    """Keep two shards in hand, or pass a stop on."""
    if stop.requested:
        worker.request_stop()
        return
    while len(in_hand) < SHARDS_IN_HAND:
        task = queue.take()
        if task is None:
            return
        in_hand[pool.submit(worker.extract_shard, task.shard_idx)] = task


def _answer(
    future: Future[ShardEntry],
    task: ShardTask,
    queue: ShardQueue,
    meter: ProgressMeter,
    on_shard: Callable[[ShardSummary], None],
) -> None:
    """One shard came back, whole or not."""
    try:
        entry = future.result()
    except ShardDroppedError:
        queue.put_back(task)
    except Exception as err:
        again = queue.fail(task, err)
        meter.report(task.failure(again))
    else:
        on_shard(summarize(entry))
