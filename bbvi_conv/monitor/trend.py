"""Does the gradient norm still fall, or has it stalled? The plateau test."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from bbvi_conv.monitor.intervals import Estimate, student_quantile, unavailable
from bbvi_conv.monitor.power_law import Fit, fit_power_law
from bbvi_conv.monitor.series import WINDOW_DECADES, Array, Series, step_range, window_start

Trend = Literal["plateau", "decaying", "rising", "undecided"]

PLATEAU_EXPONENT = -0.25
_FIRST_DECADES = 1.0


class Plateau(NamedTuple):
    """Outcome of the plateau test, with the numbers it rests on.

    Attributes:
        trend: ``plateau``, ``decaying``, ``rising`` or ``undecided``.
        exponent: exponent of U over ``window``.
        level: mean U over ``window``.
        window: first and last step of the looks used, None where there were too few.
        reason: one sentence.
    """

    trend: Trend
    exponent: Estimate
    level: Estimate
    window: tuple[int, int] | None
    reason: str


def plateau(series: Series, level: float = 0.95, threshold: float = PLATEAU_EXPONENT) -> Plateau:
    r"""Has the gradient norm stopped falling above zero?

    Over a window: ``decaying`` if the exponent's interval lies below 0; ``rising`` if above ``-threshold``; ``plateau``
    if it reaches up to 0, *excludes every decay faster than* ``threshold``, and the mean of U there is significantly
    above 0; else ``undecided``. Not seeing a slope is thus never taken for a plateau: the window must be long enough to
    have seen one. The default threshold is half the exponent -1/2 which the step sizes :math:`C n^{-1/2}` give.

    The last decade of steps is tried first, then the last 1.5. Where neither decides, the window grows by half a decade
    at a time, now only to tell a plateau (what happened earlier does not show that the run still falls), and only as
    long as the longer window follows the same power law as the last decade, by Hausman's test: since the longer fit is
    the efficient one, :math:`\operatorname{Var}(b_1 - b_2) = \operatorname{Var} b_1 - \operatorname{Var} b_2`. A
    transient of long ago can therefore not make a run that has stalled look as if it were still falling.

    Args:
        threshold: slowest decay that counts as one, negative.
    Raises:
        ValueError: if ``threshold`` is not negative.
    Reference: Hausman (1978), Econometrica 46, 1251-1271.
    """
    if not threshold < 0.0:
        raise ValueError(
            f"threshold is the exponent of a decay and must be negative, for example -0.25, got {threshold}"
        )
    first = window_start(series, _FIRST_DECADES)
    if isinstance(first, str):
        return Plateau("undecided", unavailable(first), unavailable(first), None, first)
    recent = fit_power_law(series.since(first), level)
    outcome = _trend(series.since(first), recent, level, threshold)
    decades = _FIRST_DECADES
    while outcome.trend == "undecided" and not isinstance(recent, str):
        decades += 0.5
        first = window_start(series, decades)
        if isinstance(first, str):
            break
        longer = fit_power_law(series.since(first), level)
        if isinstance(longer, str) or not _agree(recent, longer, level):
            break
        wider = _trend(series.since(first), longer, level, threshold)
        if wider.trend == "plateau" or decades <= WINDOW_DECADES:
            outcome = wider
    return outcome


def _agree(recent: Fit, longer: Fit, level: float) -> bool:
    """Do both windows follow one power law?"""
    gap_error = math.sqrt(max(recent.error**2 - longer.error**2, 0.0))
    return abs(recent.value - longer.value) <= student_quantile(level, recent.freedom) * gap_error


def _trend(window: Series, fit: Fit | str, level: float, threshold: float) -> Plateau:
    """The plateau test on one window."""
    mean, steps = _mean(window.values, level), step_range(window)
    if isinstance(fit, str):
        return Plateau("undecided", unavailable(fit), mean, steps, fit)
    slope = fit.estimate(level)
    low, high = fit.interval(level)
    told = f"exponent {fit.value:.2f} [{low:.2f}, {high:.2f}] over steps {steps[0]} to {steps[1]}"
    if high < 0.0:
        return Plateau("decaying", slope, mean, steps, f"{told}: the gradient norm still falls")
    if low > -threshold:
        return Plateau("rising", slope, mean, steps, f"{told}: the gradient norm grows")
    if low > threshold and (mean.low or 0.0) > 0.0:
        return Plateau("plateau", slope, mean, steps, f"{told}: it falls no more and is above zero")
    return Plateau(
        "undecided",
        slope,
        mean,
        steps,
        f"{told}: too wide to tell a plateau from a decay, run more steps or raise num_gradients",
    )


def _mean(values: Array, level: float) -> Estimate:
    """Mean over looks, which are even in log n, with its Student interval."""
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    half = student_quantile(level, len(values) - 1) * error
    return Estimate(mean, max(mean - half, 0.0), max(mean + half, half))
