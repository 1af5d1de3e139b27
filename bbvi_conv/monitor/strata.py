r"""Random iterates, one per stratum of steps, and the running mean they estimate.

The theory bounds :math:`E\|\nabla L(x_R)\|^2` with R uniform on {0..n}. Cutting {0..n} into strata and looking at one
uniformly drawn step of each gives the same mean with far less variance, and it can be read off at every n on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bbvi_conv.monitor.intervals import Estimate, student_quantile, unavailable
from bbvi_conv.monitor.series import Array, Series

_MIN_STRATA = 4
_STREAM = 0x57AA7A  # keeps the choice of steps apart from every other use of the seed


@dataclass(frozen=True)
class Strata:
    """Strata of steps that grow with the run, and the step looked at in each; a pure function of seed and index.

    A stratum that starts at step s holds ``max(floor(growth * s), min(1 + floor(s / 2), min_length))`` steps. The first
    holds step 0 alone and the next grow fast: a run begins with a steep fall that often makes most of the mean, and one
    draw from a long first stratum would miss it without a trace. Then looks are evenly spaced, and at last evenly
    spaced in log n, about ``2.3 / growth`` of them a decade.

    Args:
        min_length: longest of the first strata, in steps.
        growth: length of the later strata as a share of their start. Half of it doubles the looks, and with them
            what the plateau test can tell.
    Raises:
        ValueError: if ``min_length`` is below 1 or ``growth`` is negative or not finite.
    Example:
        >>> Strata(min_length=10, growth=0.5).bounds(3)
        (4, 7)
    """

    min_length: int = 20
    growth: float = 0.05

    def __post_init__(self) -> None:
        if self.min_length < 1:
            raise ValueError(f"min_length must be at least 1 step, got {self.min_length}")
        if not (math.isfinite(self.growth) and self.growth >= 0.0):
            raise ValueError(f"growth must be a finite number of at least 0, for example 0.05, got {self.growth}")

    def bounds(self, index: int) -> tuple[int, int]:
        """First step of stratum ``index`` and the first step after it.

        Raises:
            ValueError: if ``index`` is negative.
        """
        if index < 0:
            raise ValueError(f"index of a stratum must be at least 0, got {index}")
        start = 0
        for _ in range(index):
            start += self._length(start)
        return start, start + self._length(start)

    def count(self, steps: int) -> int:
        """How many strata the first ``steps`` steps touch.

        Example:
            >>> Strata(min_length=10, growth=0.5).count(5)
            4
        """
        start = found = 0
        while start < steps:
            start += self._length(start)
            found += 1
        return found

    def random_step(self, seed: int, index: int) -> int:
        """The step looked at in stratum ``index``: uniform on it, the same for a resumed run.

        Raises:
            ValueError: if ``seed`` or ``index`` is negative.
        """
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        start, stop = self.bounds(index)
        keyed = np.random.SeedSequence(entropy=seed, spawn_key=(_STREAM, index))
        return int(np.random.default_rng(keyed).integers(start, stop))

    def _length(self, start: int) -> int:
        return max(math.floor(self.growth * start), min(1 + start // 2, self.min_length))


def running_means(lengths: Array, values: Array) -> Array:
    r"""Length-weighted mean of the strata up to each one, :math:`\sum_k L_k U_k / \sum_k L_k`, shape ``(S,)``.

    Given the trajectory, entry k is unbiased for the mean of :math:`\|\nabla L(x_i)\|^2` over all steps of the strata
    0..k.
    """
    means: Array = np.cumsum(lengths * values) / np.cumsum(lengths)
    return means


def collapsed_variance(values: Array, coefficients: Array) -> tuple[float, float]:
    r"""Variance of :math:`\sum_k a_k U_k` for strata with one draw each, and its degrees of freedom.

    One draw shows no spread, so neighbouring strata are collapsed into pairs (the last three where S is odd):

    .. math:: \widehat{\operatorname{Var}} = \sum_{\text{groups } h} s_h^2 \sum_{k \in h} a_k^2,

    with :math:`s_h^2` the sample variance within a group. It holds the noise of U and the choice of the step alike, and
    where neighbouring strata have different means it is too large. Degrees of freedom by Satterthwaite, with the bias
    of the squares taken off: :math:`(\sum v_h)^2 / (\sum v_h^2/(f_h + 2)) - 2`, f for one group of f and H for H equal
    pairs.

    Args:
        values: U of each stratum, ``(S,)``.
        coefficients: a, ``(S,)``.
    Raises:
        ValueError: if there are fewer than 2 strata.
    Reference: Wolter, Introduction to Variance Estimation (2007), section 2.5.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"collapsing strata needs at least 2 of them, got {count}")
    starts = range(0, count - 1, 2)
    groups = [slice(start, start + 2 if start + 3 != count else count) for start in starts]
    parts = np.array([np.var(values[group], ddof=1) * np.sum(coefficients[group] ** 2) for group in groups])
    freedom = np.array([len(values[group]) - 1 for group in groups])
    total = float(parts.sum())
    if total == 0.0:
        return 0.0, float(freedom.sum())
    shares = parts / total
    return total, max(1.0, 1.0 / float((shares**2 / (freedom + 2)).sum()) - 2.0)


def sampling_variance(series: Series, coefficients: Array) -> tuple[float, float]:
    r"""Variance of :math:`\sum_k a_k U_k` given the trajectory, and its degrees of freedom.

    A stratum of one step leaves no choice of the step, so only the known noise of U counts; the others are collapsed.
    Without this the steep fall over the first steps, which are looked at one by one, would be taken for sampling error.

    Args:
        series: the looks.
        coefficients: a, ``(S,)``.
    """
    single = series.lengths <= 1.0
    noise = series.slopes * np.maximum(series.values, 0.0) + series.floors
    known = float((coefficients[single] ** 2 * noise[single]).sum())
    if np.count_nonzero(~single) < 2:
        spread = ~single  # too few to collapse: their noise is all that can be told
        return known + float((coefficients[spread] ** 2 * noise[spread]).sum()), math.inf
    collapsed, freedom = collapsed_variance(series.values[~single], coefficients[~single])
    total = known + collapsed
    return total, math.inf if collapsed == 0.0 else freedom * (total / collapsed) ** 2


def running_mean(series: Series, level: float = 0.95) -> Estimate:
    r""":math:`E\|\nabla L(x_R)\|^2` of this run, R uniform on all steps of the strata given, with its interval.

    The value is unbiased and may be negative; the ends are cut at 0, the upper one not below the half width. A fall by
    a large factor inside one stratum is seen only through the draws that happened to meet it: that is why the first
    ones are short.

    Returns:
        An estimate, unavailable before there are 4 looks.
    """
    if len(series.values) < _MIN_STRATA:
        return unavailable(f"needs looks in at least {_MIN_STRATA} strata, got {len(series.values)}: run more steps")
    coefficients = series.lengths / series.lengths.sum()
    variance, freedom = sampling_variance(series, coefficients)
    value = float((coefficients * series.values).sum())
    half = student_quantile(level, freedom) * math.sqrt(variance)
    return Estimate(value, max(value - half, 0.0), max(value + half, half))
