"""The looks of a run as arrays, and the last decades of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WINDOW_DECADES = 1.5
MIN_LOOKS = 8


class Series(NamedTuple):
    r"""U of consecutive strata, all arrays ``(S,)``.

    Attributes:
        steps: the step looked at in each stratum.
        lengths: steps in each stratum; the first starts at step 0.
        values: U, which may be negative.
        slopes, floors: the noise of U as
            :math:`\operatorname{Var} U = \text{slope} \cdot \|\nabla L\|^2 + \text{floor}`
            (``SquaredNorm.variance_slope``, ``variance_floor``). Where only a standard error is known: slope 0, floor
            its square.
    """

    steps: Array
    lengths: Array
    values: Array
    slopes: Array
    floors: Array

    @property
    def stops(self) -> Array:
        """First step after each stratum, ``(S,)``."""
        ends: Array = np.cumsum(self.lengths)
        return ends

    def since(self, first: int) -> Series:
        """The strata from index ``first`` on; ``lengths`` no longer start at step 0."""
        return Series(*(column[first:] for column in self))


def window_start(series: Series, decades: float) -> int | str:
    """Index of the first stratum that ends inside the last ``decades``, or one sentence on why there is none."""
    stops = series.stops
    if not len(stops):
        return "no look has been taken yet: run more steps"
    earliest = stops[-1] / 10.0**decades
    if stops[0] > earliest:
        return (
            f"needs looks over {decades:g} decades of steps: run at least {math.ceil(stops[0] * 10.0**decades)} steps"
        )
    first = int(np.searchsorted(stops, earliest))
    inside = len(stops) - first
    if inside < MIN_LOOKS:
        return f"needs {MIN_LOOKS} looks in the last {decades:g} decades of steps, got {inside}: run more steps"
    return first


def step_range(window: Series) -> tuple[int, int]:
    """First and last step looked at."""
    return int(window.steps[0]), int(window.steps[-1])
