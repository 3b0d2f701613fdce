"""Soft labels made again: `dtpipe verify --level recompute` runs the interpreter on the features that it read, or on
those that its teacher gives again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.labels.head import OpenHead, open_head
from dtpipe.extract.device import RECOMPUTE, pick_device
from dtpipe.manifests.errors import ConfigError, DtpipeError, saying_what_to_lower
from dtpipe.manifests.schema import IndexRow, Plan
from dtpipe.manifests.soft_labels import live_features_of, soft_labels_of
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.plan import load_plan
from dtpipe.pipeline.live.recorded import open_teacher, recorded_soft_labels
from dtpipe.pipeline.soft_labels.jobs import CachedProducer, open_features

if TYPE_CHECKING:
    from torch import Tensor

_Item = TypeVar("_Item")
_Again = Callable[[NDArray[np.uint8], Sequence[str], int], dict[str, NDArray[np.generic]]]


def holds_labels(url: str) -> bool:
    """Whether a dataset is of soft labels; no where its plan cannot be read, which `verify` then says."""
    try:
        return soft_labels_of(load_plan(Store(url)).recipe) is not None
    except DtpipeError:
        return False


class LabelRecomputation:
    """What `verify` calls for the soft labels of some samples."""

    measured = None

    def __init__(self, url: str, teacher: str | None, device: str, interpreter: str | None = None) -> None:
        """Raises: ConfigError when nothing says where interpreter or features are; as what opens them."""
        plan, device = load_plan(Store(url)), pick_device(device)
        self._device = device
        recorded = recorded_soft_labels(plan)
        path = _named(interpreter or recorded.get("interpreter"), "interpreter", "give it with --interpreter")
        features = live_features_of(plan.recipe)
        if features is None:
            if teacher is not None:
                raise ConfigError(f"{url}: soft labels of stored features, which no teacher makes; leave --teacher out")
            where = _named(recorded.get("features"), "features", "verify with --level decode")
            dataset = open_features(where, plan.recipe)
            head = open_head(path, plan.recipe, dataset.recipe, device)
            self._again = _of_stored(CachedProducer(head, dataset))
        else:
            head = open_head(path, plan.recipe, features, device)
            self._again = _of_live(head, plan.model_copy(update={"recipe": features}), teacher, device)

    def __call__(
        self, images: NDArray[np.uint8], keys: Sequence[str], batch_size: int
    ) -> dict[str, NDArray[np.generic]]:
        """Shapes: images [N, H, W, 3], where they are stored -> {level: [N, V, K, h, w] float32}. Raises:
        DeviceMemoryError.
        """
        with saying_what_to_lower("recomputing", self._device, batch_size, RECOMPUTE):
            return self._again(images, keys, batch_size)


def _named(path: Any, what: str, remedy: str) -> str:
    if not isinstance(path, str):
        raise ConfigError(
            f"the dataset does not say where its {what} {'are' if what == 'features' else 'is'}; {remedy}"
        )
    return path


def _of_stored(producer: CachedProducer) -> _Again:
    def again(_images: NDArray[np.uint8], keys: Sequence[str], batch_size: int) -> dict[str, NDArray[np.generic]]:
        rows = [producer.prepare(IndexRow(row=0, key=key, shard=0)) for key in keys]
        return _joined([producer.produce(batch, batch_size).levels for batch in _batches(rows, batch_size)])

    return again


def _of_live(head: OpenHead, plan: Plan, teacher: str | None, device: str) -> _Again:
    opened = open_teacher(plan, {"path": teacher} if teacher else {}, device)

    def again(images: NDArray[np.uint8], keys: Sequence[str], batch_size: int) -> dict[str, NDArray[np.generic]]:
        levels = opened.encode(images, keys, batch_size)
        batches = [
            {name: values[list(batch)] for name, values in levels.items()}
            for batch in _batches(range(len(keys)), batch_size)
        ]
        return _joined([head.soft_labels(batch, batch_size) for batch in batches])

    return again


def _batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, NDArray[np.generic]]:
    import torch

    return {name: torch.cat([batch[name] for batch in batches]).cpu().numpy() for name in batches[0]}
