"""R² of a level: what share of how the teacher's whitened level varies the student says, beyond a constant.

R² = 1 - sum (f_r - W(f_g))^2 / sum (W(f_g) - mean)^2 over samples and elements, where the mean is the dataset's of each
channel: that constant has 0, a perfect student 1. It is the ratio of sums, so parts of a batch do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping

ERROR, SPREAD, R2 = "mse", "spread", "r2"
"""What stands before the name of a level: the mean squared error, that of the constant, and R²."""


def with_r2(losses: Mapping[str, float]) -> dict[str, float]:
    """Means of losses with R² in place of the constant's error; without, where the teacher's level does not vary."""
    values = {name: value for name, value in losses.items() if not name.startswith(f"{SPREAD}/")}
    for name, spread in losses.items():
        term, _, level = name.partition("/")
        if term == SPREAD and spread > 0:
            values[f"{R2}/{level}"] = 1 - losses[f"{ERROR}/{level}"] / spread
    return values
