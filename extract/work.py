"""What an extraction is to do: all that determines its content, and the job that makes it.

`run_extraction` resolves a teacher over images into it; whatever else makes levels of rows brings its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dtpipe.extract.census import Census, change_since
from dtpipe.extract.config import ExtractConfig, ExtractRun
from dtpipe.extract.fitting.base import FitRequest
from dtpipe.extract.recipe import Resolved, resolve_recipe
from dtpipe.extract.shards.producer import Job
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import Recipe
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.listing import Listing
from dtpipe.manifests.write.plan import find_plan

HasGpus = Callable[[], bool | None]


@dataclass(frozen=True)
class Work:
    """An extraction with everything looked up."""

    recipe: Recipe
    listing: Callable[[], Listing]
    """The samples by row; called where a dataset is to begin."""
    job: Job
    """For workers in other processes."""
    job_here: Job
    """For a worker in this one: with what is loaded here already."""
    selection: Mapping[str, Any]
    """What chose the rows but is no content; compared when a dataset is gone on with."""
    census: Census | None = None
    """What the source holds, where a dataset is to begin."""
    change: Callable[[Mapping[str, Any], str], str | None] = lambda _seen, _url: None
    """What changed in the source since the plan saw it, for a dataset at a URL."""
    fit: FitRequest | None = None
    """What codecs of the recipe are to be fitted, before there is a plan."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """More for the provenance of the plan."""
    num_bad_before: int = 0
    """Rows known to be bad before any work: the error budget is of others."""


class Resolve(Protocol):
    """Looks everything up and writes nothing. Raises: DtpipeError."""

    def __call__(self, *, fresh: bool = False, cluster_has_gpus: HasGpus | None = None) -> Work:
        """fresh: refuse a dataset that is there. cluster_has_gpus: asked only where the recipe depends on it; None asks
        this machine.
        """
        ...


def teacher_work(config: ExtractConfig, *, fresh: bool = False, cluster_has_gpus: HasGpus | None = None) -> Work:
    """A teacher over images, or over numbered samples. Raises: as `resolve_recipe`."""
    return work_of(resolve_recipe(config, fresh=fresh, cluster_has_gpus=cluster_has_gpus))


def work_of(resolved: Resolved) -> Work:
    """The work of a resolved recipe, with its teacher."""
    from dtpipe.extract.shards.teacher import TeacherJob

    config, source = resolved.config, resolved.source
    job = TeacherJob(
        config.teacher, config.images, resolved.recipe.source.kind, config.num_samples, config.source.max_pixels
    )
    return Work(
        recipe=resolved.recipe,
        listing=lambda: resolved.listing,
        job=job,
        job_here=replace(job, loaded=resolved.teacher),
        selection=resolved.selection,
        fit=resolved.fit,
        census=resolved.census,
        change=lambda seen, url: change_since(seen, source, url),
    )


def refuse_lower_batch(config: ExtractRun, store: Store, fresh: bool = False) -> None:
    """See that smaller batches are asked for only where a dataset is that began with larger ones.

    Raises: ConfigError saying what to give in their place.
    """
    lower_to = config.lower_batch_to
    if lower_to is None:
        return
    plan = find_plan(store, fresh)
    if plan is None:
        raise ConfigError(
            f"--lower-batch-to is {lower_to}, and {store.url} holds no dataset yet whose shards could be left; give "
            f"--batch-size {lower_to}"
        )
    planned = plan.recipe.compute.batch_size
    if lower_to > planned:
        raise ConfigError(
            f"--lower-batch-to is {lower_to}, and {store.url} was begun with batches of {planned}; give less, or leave "
            "it out"
        )
