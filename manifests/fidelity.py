"""How far decoded features are from what the teacher gave, as the losses see it.

Measured while extracting, on features before they are coded, and kept beside the content: the true ones are not stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

CODEC_ERROR: Final = "codec_error"  # key in the provenance of entries and of a manifest: level to `Fidelity.record`
FIT_EXPECTS: Final = "fit"  # key in a plan's provenance: `levels`, each with `relative_mse` and `size_bytes` of a view
_EPS = 1e-5  # of LayerNorm, as the loss whitens


@dataclass(frozen=True)
class Fidelity:
    """Errors of one level over samples and views."""

    num: int
    """Pairs of a sample and a view."""
    relative_mse: float
    """Mean squared error of whitened features, whose variance is 1; mean over the pairs."""
    worst: float
    """The same of the worst pair."""
    cosine: float
    """Between whitened features; mean over the pairs."""
    attention: float
    """L2 distance of attention maps of unit length, as equation (2) has it; mean over the pairs."""

    @classmethod
    def of(cls, true: NDArray[np.generic], decoded: NDArray[np.generic]) -> Self:
        """Shapes: both [N, C, h, w]."""
        one, other = _whitened(true), _whitened(decoded)
        errors = np.square(other - one).mean(axis=1)
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosines = (one * other).sum(axis=1) / np.maximum(lengths, 1e-12)
        apart = np.linalg.norm(_attention(decoded) - _attention(true), axis=1)
        means = (float(values.mean()) for values in (cosines, apart))
        return cls(len(errors), float(errors.mean()), float(errors.max()), *means)

    @classmethod
    def merged(cls, parts: Iterable[Fidelity]) -> Self | None:
        """Over the pairs of all; None of none."""
        known = list(parts)
        num = sum(part.num for part in known)
        if not num:
            return None
        means = (
            sum(part.num * value for part, value in zip(known, values, strict=True)) / num
            for values in zip(*((part.relative_mse, part.cosine, part.attention) for part in known), strict=True)
        )
        relative_mse, cosine, attention = means
        return cls(num, relative_mse, max(part.worst for part in known), cosine, attention)

    def record(self) -> dict[str, Any]:
        """As plain values, to six digits."""
        return {name: value if name == "num" else float(f"{value:.6g}") for name, value in asdict(self).items()}


def merged_records(records: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By level, over what several entries recorded; empty where nothing was measured."""
    parts: dict[str, list[Fidelity]] = {}
    for record in records:
        for level, values in record.items():
            parts.setdefault(level, []).append(Fidelity(**values))
    merged = {level: Fidelity.merged(of_level) for level, of_level in sorted(parts.items())}
    return {level: fidelity.record() for level, fidelity in merged.items() if fidelity is not None}


def _whitened(level: NDArray[np.generic]) -> NDArray[np.float64]:
    """Shapes: [N, C, h, w] -> [N, C*h*w]."""
    flat = level.reshape(len(level), -1).astype(np.float64)
    centred = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + _EPS))


def _attention(level: NDArray[np.generic]) -> NDArray[np.float64]:
    """Shapes: [N, C, h, w] -> [N, h*w], each of unit length."""
    energy = np.square(level.astype(np.float64)).sum(axis=1).reshape(len(level), -1)
    return np.asarray(energy / np.maximum(np.linalg.norm(energy, axis=1, keepdims=True), 1e-12))
