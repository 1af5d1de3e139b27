"""Runs whose answer is known: a planted gradient norm, seen with the noise of U and of the iterates."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from bbvi_conv.monitor import Series, Strata


@cache
def whole_strata(steps: int) -> list[tuple[int, int]]:
    """Bounds of the default strata that fit into ``steps``."""
    strata, bounds = Strata(), []
    while (pair := strata.bounds(len(bounds)))[1] <= steps:
        bounds.append(pair)
    return bounds


@pytest.fixture
def planted() -> Callable[..., Series]:
    """``planted(truth, steps, seed, spread=, noise=)``: U around ``truth(n)``.

    ``spread`` is the relative spread of the iterates' own squared gradient norm (gamma distributed, as the norm of a
    noisy iterate is), ``noise`` the standard error of U at a zero gradient relative to the last ``truth``.
    """

    def build(truth: Callable[..., np.ndarray], steps: int, seed: int, *, spread: float, noise: float) -> Series:
        rng, bounds = np.random.default_rng(seed), whole_strata(steps)
        looked = np.array([float(rng.integers(*pair)) for pair in bounds])
        lengths = np.array([float(stop - start) for start, stop in bounds])
        mean = truth(looked + 1.0)
        norms = mean * (rng.gamma(spread**-2, spread**2, len(mean)) if spread else 1.0)
        slopes = np.full(len(mean), 0.2 * noise * mean[-1])
        floors = np.full(len(mean), (noise * mean[-1]) ** 2)
        values = norms + np.sqrt(slopes * norms + floors) * rng.standard_normal(len(mean))
        return Series(looked, lengths, values, slopes, floors)

    return build
