r"""Figures over S independent seeds, and whether the seeds agree.

The theory bounds :math:`E\|\nabla L(x_R)\|^2`, an expectation over runs as well as over the random iterate R: one run
estimates the latter alone, S seeds both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bbvi_conv.monitor.distance import paired_improvement
from bbvi_conv.monitor.gradient_norm import ends
from bbvi_conv.monitor.intervals import Estimate, student_quantile, unavailable
from bbvi_conv.monitor.rate import rates
from bbvi_conv.monitor.series import Array, Series
from bbvi_conv.monitor.state import FIGURES, MonitorState, Summary, no_figure, series, summary
from bbvi_conv.monitor.strata import running_mean, sampling_variance

FAR = 2.0
"""Standard deviations between two means: an even mixture of two equal normals has two modes only beyond it."""


def mean_series(monitors: Sequence[MonitorState], figure: str = "total", *, steps: int | None = None) -> Series | None:
    r"""U averaged over seeds that looked at the same steps; None where the figure has no parameters or no look.

    Its noise is that of a mean of S: :math:`\operatorname{Var} \bar U = (A \bar\mu + B)/S` with A, B averaged.
    """
    runs = [series(monitor, figure, steps=steps) for monitor in monitors]
    present = [run for run in runs if run is not None]
    if not present or len(present) != len(runs):
        return None
    count = len(present)
    return Series(
        present[0].steps,
        present[0].lengths,
        np.mean([run.values for run in present], axis=0),
        np.mean([run.slopes for run in present], axis=0) / count,
        np.mean([run.floors for run in present], axis=0) / count,
    )


def common(monitors: Sequence[MonitorState]) -> list[MonitorState]:
    """The looks that all have."""
    least = min(len(monitor.looks) for monitor in monitors)
    return [monitor._replace(looks=monitor.looks[:least]) for monitor in monitors]


def over_seeds(monitors: Sequence[MonitorState], *, steps: int, level: float = 0.95) -> Summary:
    """The figures of S runs that looked at the same steps; of one, :func:`~bbvi_conv.monitor.state.summary`.

    Args:
        monitors: the looks of each seed; those past the last look that all have are left out.
        steps: iterates that all of them made, the start included.
        level: coverage of the intervals.
    """
    monitors = common(monitors)
    covered = steps if monitors[0].looks else None
    if len(monitors) == 1:
        return summary(monitors[0], steps=covered, level=level)
    means, latest = {}, {}
    for name in FIGURES:
        mean = mean_series(monitors, name, steps=covered)
        runs = [run for monitor in monitors if (run := series(monitor, name, steps=covered)) is not None]
        missing = no_figure(monitors[0], name)
        means[name] = missing if mean is None else expected_norm(runs, mean, level)
        latest[name] = missing if mean is None else _latest(mean, monitors, name, level)
    whole = mean_series(monitors, steps=covered)
    run = Series(*(np.empty(0) for _ in Series._fields)) if whole is None else whole
    label = f"over {len(monitors)} seeds"
    return Summary(label, len(monitors[0].looks), int(run.lengths.sum()), means, latest, rates(run, level))


def expected_norm(runs: Sequence[Series], mean: Series, level: float = 0.95) -> Estimate:
    r""":math:`E\|\nabla L(x_R)\|^2` over runs and R, from S runs that drew the same R.

    The means :math:`m_s` of the runs over their strata are independent given R, so that their spread tells the variance
    over runs, noise of U included; that over R is told by the mean series:

    .. math:: \operatorname{Var} = \frac{1}{S(S-1)} \sum_s (m_s - \bar m)^2 + \operatorname{Var}_R .

    The second part holds the noise of U once more, which makes the interval a little too wide, never too narrow.
    Degrees of freedom by Satterthwaite.
    """
    if running_mean(mean, level).value is None:
        return running_mean(mean, level)
    coefficients = mean.lengths / mean.lengths.sum()
    each = np.array([float((coefficients * run.values).sum()) for run in runs])
    parts = np.array([float(each.var(ddof=1)) / len(each), 0.0])
    parts[1], freedom = sampling_variance(mean, coefficients)
    value, total = float(each.mean()), float(parts.sum())
    shares = parts / total if total > 0.0 else parts
    inverse = float((shares**2 / np.array([len(each) - 1, freedom])).sum())
    half = student_quantile(level, 1.0 / inverse if inverse > 0.0 else math.inf) * math.sqrt(total)
    return Estimate(value, max(value - half, 0.0), max(value + half, half))


def _latest(mean: Series, monitors: Sequence[MonitorState], name: str, level: float) -> Estimate:
    """Mean U at the last look, by the noise of U alone."""
    norms = [norm for monitor in monitors if (norm := monitor.looks[-1].norm(name)) is not None]
    value, freedom = float(mean.values[-1]), sum(norm.num_gradients - 1 for norm in norms)
    quantile = student_quantile(level, freedom)
    return Estimate(value, *ends(value, float(mean.slopes[-1]), float(mean.floors[-1]), quantile))


class Agreement(NamedTuple):
    """Whether what the seeds found is the same, by seed.

    Attributes:
        best: the seed that the others are compared with.
        shortfall: how much lower the bound of each is than that of the best, in nats.
        distance: largest distance of a posterior mean of each from that of the best, in pooled standard deviations.
        disagree: seeds that found something else than the best.
    """

    best: int
    shortfall: dict[int, Estimate]
    distance: dict[int, Estimate]
    disagree: tuple[int, ...]


def highest(losses: Tensor, frozen: Sequence[bool]) -> int:
    """Index of the seed with the lowest mean of its losses ``(S, n)``; a frozen one only where all are."""
    means = losses.to(torch.float64).mean(1).nan_to_num(nan=1e300, posinf=1e300)
    if not all(frozen):
        means = means.masked_fill(torch.tensor(list(frozen), device=means.device), math.inf)
    return int(means.argmin())


def agreement(
    losses: Tensor,
    seeds: Sequence[int],
    best: int,
    moments: tuple[Array, Array, int] | str,
    tolerance: float,
    level: float = 0.95,
) -> Agreement:
    r"""Compare every seed with the best.

    *Bounds*, on common noise: two runs whose remaining gaps are under the tolerance and that are near the same optimum
    differ by less than the tolerance. They disagree where the whole interval of the difference is above it.

    *Locations*: :math:`\max_i |m_{si} - m_{bi}| / \sigma_i`, with :math:`\sigma_i^2` the mean of the two variances.
    They disagree where the whole interval is above :data:`FAR`. By the normal approximation the error of one difference
    d is :math:`\sqrt{2/n + d^2/(4n)}`.

    Intervals hold for all comparisons together (Bonferroni).

    Args:
        losses: ``(S, n)`` in total nats, common random numbers.
        seeds: which they are, ``best`` among them.
        best: the seed that the others are compared with.
        moments: means ``(S, D)`` and standard deviations ``(S, D)`` of the posterior, and the number of draws they
            rest on; or why there are none.
        tolerance: on the remaining gap, in nats.
    """
    at = list(seeds).index(best)
    each = 1.0 - (1.0 - level) / max(len(seeds) - 1, 1)
    others = [(s, seed) for s, seed in enumerate(seeds) if seed != best]
    shortfall = {seed: paired_improvement(losses[s], losses[at], level=each) for s, seed in others}
    distance = {seed: _distance(moments, s, at, each) for s, seed in others}
    apart = [
        seed
        for seed in shortfall
        if shortfall[seed].value is None
        or (shortfall[seed].low or 0.0) > tolerance
        or (distance[seed].low or 0.0) > FAR
    ]
    return Agreement(best, shortfall, distance, tuple(apart))


def _distance(moments: tuple[Array, Array, int] | str, one: int, other: int, level: float) -> Estimate:
    if isinstance(moments, str):
        return unavailable(moments)
    means, deviations, draws = moments
    pooled = np.sqrt((deviations[one] ** 2 + deviations[other] ** 2) / 2)
    difference = np.abs(means[one] - means[other])
    known = (pooled > 0.0) & np.isfinite(pooled) & np.isfinite(difference)
    if not known.any():
        return unavailable("no latent site has a spread: use a family with a density")
    apart = difference[known] / pooled[known]
    error = np.sqrt(2.0 / draws + apart**2 / (4.0 * draws))
    quantile = student_quantile(1.0 - (1.0 - level) / len(apart), math.inf)
    at = int(np.argmax(apart))
    low = float(np.max(apart - quantile * error))
    return Estimate(float(apart[at]), max(low, 0.0), float(np.max(apart + quantile * error)))
