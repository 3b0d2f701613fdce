"""The step before the plan: codecs fitted here or on a worker, kept beside the data, and named by the recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from dtpipe.extract.cluster.connection import Connection
from dtpipe.extract.cluster.preflight import package_versions
from dtpipe.extract.config import ExtractRun
from dtpipe.extract.fitting.base import FitRequest, FitResult, adopted
from dtpipe.extract.fitting.fit import fit_task
from dtpipe.extract.shards.progress import OnExtractProgress, ProgressMeter
from dtpipe.extract.work import Work
from dtpipe.manifests.codecs.fitted import fitted_names, read_fitted
from dtpipe.manifests.errors import DamagedDataError, PlanChangedError
from dtpipe.manifests.fidelity import FIT_EXPECTS
from dtpipe.manifests.schema import Plan, Recipe
from dtpipe.manifests.stopping import StopRequest
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.words import count_of
from dtpipe.manifests.write.fitted import keep_fitted
from dtpipe.manifests.write.plan import find_plan

_SHOWN_EVERY_S = 0.5


@dataclass(frozen=True)
class FitPlace:
    """Where a fit runs and whom it tells."""

    config: ExtractRun
    connection: Connection
    stop: StopRequest
    on_progress: OnExtractProgress | None


def fit_before_plan(work: Work, store: Store, place: FitPlace) -> Work:
    """The work with the codecs of its recipe: those of the plan that is there, or fitted now and kept in the store.

    The caller holds the lock.
    Raises: as `FitTask.run`; PlanChangedError where what a plan names was lost and another fit comes out.
    """
    request = work.fit
    if request is None:
        return work
    plan = find_plan(store)
    recipe = None if plan is None else adopted(work.recipe, plan.recipe, request)
    if recipe is not None and (_is_whole(store, recipe) or not _same_codecs(recipe, plan)):
        return replace(work, recipe=recipe)  # what differs is refused with the rest of the recipe
    result = _fit(work, request, place)
    if recipe is not None and result.recipe(work.recipe) != recipe:
        raise PlanChangedError(
            f"{store.url}: what its levels were coded with was lost, and fitting again gives other numbers (another "
            "device, other versions or images); put back a copy of the folder codecs/, or extract to another --out"
        )
    keep_fitted(store, result.files)
    return replace(work, recipe=result.recipe(work.recipe), record={FIT_EXPECTS: result.record()})


def _same_codecs(recipe: Recipe, plan: Plan | None) -> bool:
    return plan is not None and recipe.levels == plan.recipe.levels


def _is_whole(store: Store, recipe: Recipe) -> bool:
    """True where all that the levels name is there and sound."""
    try:
        for name in fitted_names(*recipe.levels):
            read_fitted(store, name)
    except DamagedDataError:
        return False
    return True


def _fit(work: Work, request: FitRequest, place: FitPlace) -> FitResult:
    """Run the fit in this process or on a worker, and say how it goes."""
    task = fit_task(work.recipe, work.listing(), request, work.job, place.config.decode_threads)
    meter = ProgressMeter(0, len(task.listing), on_progress=place.on_progress)
    named = ", ".join(f"{name} {codec}" for name, codec in request.codecs.items())
    meter.report(f"fitting codecs ({named}) to {count_of(len(task.listing), 'sample')}")
    meter.worker_ready()
    tell = _telling(meter, place.stop)
    if place.config.inline:
        result = replace(task, job=work.job_here).run(work.recipe.compute.device, tell)
    else:
        from dtpipe.extract.cluster.fit import fit_on_cluster

        place.connection.join()
        result = fit_on_cluster(task, place.config, work.recipe.compute.device, package_versions(), tell)
    for remark in result.remarks:
        meter.report(remark)
    return result


def _telling(meter: ProgressMeter, stop: StopRequest) -> Callable[[int, int, str | None], None]:
    """Shows progress a few times a second, and obeys a stop."""
    shown_s = time.monotonic()

    def tell(done: int, _total: int, event: str | None) -> None:
        nonlocal shown_s
        stop.raise_if_requested("codecs were being fitted", "nothing is written yet")
        meter.samples_done = done
        meter.encoded(done)
        if event is not None or time.monotonic() - shown_s > _SHOWN_EVERY_S:
            shown_s = time.monotonic()
            meter.report(event)

    return tell
