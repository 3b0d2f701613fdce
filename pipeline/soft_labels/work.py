"""From settings of soft labels to the work of an extraction: the recipe, the rows and the job.

One rule: rows, keys and their order are those of the features; whoever joins both finds each row's own.
"""

from __future__ import annotations

from dataclasses import replace

from dtpipe.distill.labels.files import LoadedInterpreter, load_interpreter
from dtpipe.distill.labels.head import label_level, levels_read, refuse_other_features, views_of
from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.recipe import device_type, resolve_recipe
from dtpipe.extract.shards.teacher import TeacherJob
from dtpipe.extract.work import HasGpus, Work, work_of
from dtpipe.manifests.errors import DtpipeError, InputError
from dtpipe.manifests.image_coding import PLAIN
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import CodecRecipe, ComputeRecipe, LevelSpec, Recipe, ShardRecipe, StoredDtype
from dtpipe.manifests.soft_labels import interpreter_recipe, recipe_of_live
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.listing import Listing
from dtpipe.manifests.write.plan import bytes_per_sample, find_plan, shard_samples_for
from dtpipe.pipeline.soft_labels.config import CachedConfig, SoftLabelConfig
from dtpipe.pipeline.soft_labels.jobs import CachedJob, LiveJob, digest_of


def cached_work(
    labels: SoftLabelConfig, config: CachedConfig, *, fresh: bool = False, cluster_has_gpus: HasGpus | None = None
) -> Work:
    """An interpreter over stored features; no teacher runs.

    Raises: ConfigError when it cannot read them; InputError when features or interpreter are not there.
    """
    assert labels.features is not None
    plan = find_plan(Store(config.run.out), fresh)
    dataset, head = _open_source(labels.features), load_interpreter(labels.interpreter)
    device = device_type(config.run, plan.recipe if plan else None, cluster_has_gpus)
    if config.run.inline:
        pick_device(device)
    level, features = _label_level(labels, head, dataset.recipe, labels.features, config.shard.dtype)
    views = views_of(head, features)
    samples = config.shard.samples or shard_samples_for(bytes_per_sample([level], len(views), None))
    recipe = features.model_copy(
        update={
            "teacher": interpreter_recipe(
                head.digest, head.network.spec.classes.names, {"dataset": digest_of(dataset)}
            ),
            "views": tuple(label.view for label in views),
            "levels": (level,),
            "images": "joined",
            "image_coding": PLAIN,
            "codec": CodecRecipe(zstd_level=config.shard.zstd_level),
            "shard": ShardRecipe(format=config.shard.format, samples=samples),
            "compute": ComputeRecipe(device=device, batch_size=config.batch_size, threads=config.threads),
        }
    )
    job = CachedJob(labels.interpreter, labels.features)
    num_bad = len(dataset.columns) - len(dataset.columns.ok_rows)
    return Work(recipe, lambda: _listing(dataset), job, job, {}, num_bad_before=num_bad)


def live_work(
    labels: SoftLabelConfig, config: ExtractConfig, *, fresh: bool = False, cluster_has_gpus: HasGpus | None = None
) -> Work:
    """An interpreter behind a teacher, in one pass. Raises: as `resolve_recipe`; ConfigError as `cached_work`."""
    head = load_interpreter(labels.interpreter)
    resolved = resolve_recipe(config, fresh=fresh, cluster_has_gpus=cluster_has_gpus)
    level, features = _label_level(labels, head, resolved.recipe, config.teacher.path, config.shard.dtype)
    views = views_of(head, features)
    image_px = (features.transform.height, features.transform.width) if features.images == "stored" else None
    samples = config.shard.samples or shard_samples_for(bytes_per_sample([level], len(views), image_px))
    recipe = features.model_copy(
        update={
            "teacher": interpreter_recipe(head.digest, head.network.spec.classes.names, recipe_of_live(features)),
            "views": tuple(label.view for label in views),
            "levels": (level,),
            "codec": CodecRecipe(zstd_level=features.codec.zstd_level),  # logits are smooth: zstd halves them
            "shard": ShardRecipe(format=config.shard.format, samples=samples),
        }
    )
    work = work_of(resolved)
    assert isinstance(work.job, TeacherJob)
    assert isinstance(work.job_here, TeacherJob)
    job = LiveJob(labels.interpreter, work.job, features)
    return replace(work, recipe=recipe, fit=None, job=job, job_here=replace(job, teacher=work.job_here))


def _open_source(url: str) -> FeatureDataset:
    try:
        return FeatureDataset.open(url)
    except InputError:
        raise
    except DtpipeError as err:
        raise type(err)(f"--from {err}") from err


def _label_level(
    labels: SoftLabelConfig, head: LoadedInterpreter, features: Recipe, where: str, dtype: StoredDtype
) -> tuple[LevelSpec, Recipe]:
    """The level of soft labels, and the recipe of the features that are read for it.

    Raises: TeacherError for features that the interpreter was not trained on; ConfigError.
    """
    refuse_other_features(head, features, where)
    read = levels_read(head.network.spec, features.levels, where)
    level = label_level(head.network.spec, read, features.student_px, dtype, labels.stride, labels.top_k)
    return level, features.model_copy(update={"levels": read})


def _listing(dataset: FeatureDataset) -> Listing:
    """The rows of a dataset; a URI is the number of the row there."""
    columns = dataset.columns
    uris = tuple(str(row) for row in range(len(columns)))
    return Listing(tuple(columns.keys), uris, tuple(columns.labels))
