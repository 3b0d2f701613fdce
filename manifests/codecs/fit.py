"""What a codec learns from a sample of the features before a plan is written: parameters, and arrays beside the data.

One rule: parameters are of the recipe and say which arrays a level becomes; the arrays are named there by digest, lie
beside the data, and are loaded when something is coded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.rans_tables import Coder
from dtpipe.manifests.errors import ConfigError

OnStep = Callable[[], None]
"""Called now and then while a fit goes on; what it raises ends the fit."""


def go_on() -> None:
    """The `OnStep` that does nothing."""


@dataclass(frozen=True)
class FitTarget:
    """What a fit is to reach, and how its sizes are reckoned."""

    relative_mse: float
    """Mean squared error of the features over their variance, both of each sample and level; mean over samples."""
    entropy: Coder = "zstd"
    """How the symbols become bytes."""
    zstd_level: int = 3
    """Of zstd; 0: the symbols are stored as they are."""

    def __post_init__(self) -> None:
        if not np.isfinite(self.relative_mse) or self.relative_mse <= 0:
            raise ConfigError(f"a codec is fitted for an error above 0; found relative_mse {self.relative_mse}")


@dataclass(frozen=True)
class Fit:
    """What was fitted to a level, and what it costs by the samples that the basis did not see."""

    parameters: Mapping[str, Any]
    """For `level.codec.parameters`, beside the digest of the arrays."""
    arrays: Mapping[str, NDArray[np.generic]]
    coded_mse: float
    """What symbols lose, as `FitTarget` has it: the part that follows the target."""
    size_bytes: float
    """Of a row and view, as stored, without checksums and indexes."""
    fixed_mse: float = 0.0
    """What the arrays lose on top, whatever the target."""

    @property
    def relative_mse(self) -> float:
        """What features lose."""
        return self.coded_mse + self.fixed_mse
