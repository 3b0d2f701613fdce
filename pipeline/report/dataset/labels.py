"""Labels of a dataset: of its samples as the source gave them, and soft labels as an interpreter gave them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LabelCounts:
    """Samples by label, most frequent first."""

    counts: dict[str, int]
    num_without: int

    @classmethod
    def of(cls, labels: Sequence[str | None]) -> LabelCounts:
        """Of all samples."""
        counts = Counter(label for label in labels if label is not None)
        return cls(dict(counts.most_common()), len(labels) - counts.total())


@dataclass
class LogitSums:
    """Soft labels as they stream by: shares of cells by their likeliest class, and how sure they are."""

    num_classes: int
    num_cells: int = 0
    shares: NDArray[np.int64] = field(init=False)
    entropy: float = 0.0

    def __post_init__(self) -> None:
        self.shares = np.zeros(self.num_classes, np.int64)

    def add(self, logits: NDArray[np.float64]) -> None:
        """Shapes: (B, K, h, w)."""
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_shares = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        self.entropy += float(-(np.exp(log_shares) * log_shares).sum())
        self.num_cells += logits[:, 0].size
        self.shares += np.bincount(logits.argmax(axis=1).reshape(-1), minlength=self.num_classes)

    @property
    def class_shares(self) -> NDArray[np.float64]:
        """Share of cells that each class is the likeliest of. Shapes: -> (K,)."""
        return np.asarray(self.shares / max(1, self.num_cells))

    @property
    def mean_entropy(self) -> float:
        """In nats; log K where nothing is known."""
        return self.entropy / max(1, self.num_cells)
