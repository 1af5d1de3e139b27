r"""The exponent of a noisy non-negative quantity that may be observed as negative."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from bbvi_conv.monitor.intervals import Estimate, student_quantile, unavailable
from bbvi_conv.monitor.series import WINDOW_DECADES, Array, Series, window_start

_MAX_ITERATIONS = 200
_MAX_EXPONENT = 50.0
_MIN_SPREAD = 1e-12  # keeps a noise-free series solvable


class Fit(NamedTuple):
    """A fitted power law: its exponent, the exponent's standard error and degrees of freedom."""

    value: float
    error: float
    freedom: int

    def estimate(self, level: float) -> Estimate:
        """The exponent with its Student interval."""
        return Estimate(self.value, *self.interval(level))

    def interval(self, level: float) -> tuple[float, float]:
        """Ends of the Student interval."""
        half = student_quantile(level, self.freedom) * self.error
        return self.value - half, self.value + half


def exponent(series: Series, level: float = 0.95, decades: float = WINDOW_DECADES) -> Estimate:
    r"""b of :math:`E[U_n] = a\, n^b` over the last ``decades`` of steps.

    U is unbiased and may be negative, so its logarithm is never taken: dropping or clipping negative values would bend
    b towards 0 just where the answer matters. The power law is fitted to U itself, each stratum one observation (strata
    are geometric, so they are the bins), by quasi-likelihood with log link and variance

    .. math:: \operatorname{Var} U_n = A_n \mu_n + B_n + \tau^2 \mu_n^2, \qquad \mu_n = a\, n^b .

    A, B are the known noise of U at its mean (not at its value: weighting by the observed value would favour the
    draws that came out small), and :math:`\tau` is the relative spread of the iterates themselves, chosen so that
    Pearson's statistic equals its degrees of freedom (0 if it is already below). The estimating equations are unbiased
    whatever the variance. Interval: Student with S - 2 degrees of freedom.

    Returns:
        An estimate, unavailable where the run does not span ``decades``, has fewer than 8 looks there, or U is not
        distinguishable from 0 over them.
    Reference: McCullagh and Nelder, Generalized Linear Models (1989), chapter 9.
    """
    first = window_start(series, decades)
    if isinstance(first, str):
        return unavailable(first)
    fit = fit_power_law(series.since(first), level)
    return unavailable(fit) if isinstance(fit, str) else fit.estimate(level)


def fit_power_law(window: Series, level: float) -> Fit | str:
    """The power law of :func:`exponent` on the whole of ``window``, or one sentence on why there is none."""
    reason = _no_signal(window, level)
    if reason:
        return reason
    log_n = np.log(window.steps + 1.0)
    design = np.stack([np.ones_like(log_n), log_n - log_n.mean()], axis=1)
    mean = float(window.values.mean())
    start = mean if mean > 0.0 else float(np.abs(window.values).mean())
    beta, spread = np.array([math.log(start), 0.0]), 1.0
    with np.errstate(all="ignore"):  # a fit that runs away is caught by its size
        for iteration in range(_MAX_ITERATIONS):
            mu = np.exp(design @ beta)
            weights = mu**2 / (window.slopes * mu + window.floors + spread * mu**2)
            information = design.T @ (weights[:, None] * design)
            if not np.linalg.det(information) > 0.0:
                break
            move = np.linalg.solve(information, design.T @ (weights * (window.values / mu - 1.0)))
            largest = float(np.abs(move).max())
            beta = beta + move * min(1.0, 1.0 / max(largest, 1e-300))
            if not abs(float(beta[1])) < _MAX_EXPONENT:
                break
            change = max(_spread(window, np.exp(design @ beta)), _MIN_SPREAD) - spread
            if largest < 1e-8 and abs(change) <= 1e-7 * (1.0 + spread):
                error = math.sqrt(float(np.linalg.inv(information)[1, 1]))
                return Fit(float(beta[1]), error, len(log_n) - 2)
            spread += change if iteration < 10 else 0.5 * change
    return "no power law fits the squared gradient norm over the window: run more steps or raise num_gradients"


def _no_signal(window: Series, level: float) -> str:
    """Empty if U is significantly above 0 on the window under its own noise, else why no exponent can be had."""
    silent = window.floors <= 0.0
    if silent.any():
        return "" if (window.values[silent] > 0.0).any() else "the gradient is exactly zero over the window"
    pooled = float((window.values / window.floors).sum() / math.sqrt(float((1.0 / window.floors).sum())))
    if pooled > student_quantile(level, math.inf):
        return ""
    return "the squared gradient norm is not distinguishable from 0 over the window: raise num_gradients"


def _spread(window: Series, mu: Array) -> float:
    """tau^2 for which Pearson's statistic equals its degrees of freedom; 0 if it is below them at 0.

    The statistic is convex and falling in tau^2, so Newton's steps close in from the left.
    """
    squares, noise, freedom = (window.values - mu) ** 2, window.slopes * mu + window.floors, len(mu) - 2
    without_noise = float((squares / mu**2).sum()) / freedom  # an upper bound of the root
    tiny = 1e-9 * without_noise
    if without_noise == 0.0 or float((squares / (noise + tiny * mu**2)).sum()) <= freedom:
        return 0.0
    spread = without_noise
    for _ in range(50):
        variance = noise + spread * mu**2
        excess = float((squares / variance).sum()) - freedom
        move = excess / float((squares * mu**2 / variance**2).sum())
        if abs(move) <= 1e-10 * spread:
            break
        spread = max(spread + move, 0.1 * spread)
    return spread
