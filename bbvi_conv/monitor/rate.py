r"""How fast the gradient norm falls: the running mean against the theorem's envelope, and the exponent of U itself.

Two numbers, because the running mean alone falls like 1/n for any run that drops fast and then stalls: its own slope
says nothing about what happens now. The exponent of the pointwise U does, and the plateau test reads it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from bbvi_conv.monitor.intervals import Estimate, student_quantile, unavailable
from bbvi_conv.monitor.power_law import exponent
from bbvi_conv.monitor.series import WINDOW_DECADES, Array, Series, step_range, window_start
from bbvi_conv.monitor.strata import running_means, sampling_variance
from bbvi_conv.monitor.trend import Plateau, plateau


class Rate(NamedTuple):
    """Both rates over the last 1.5 decades of steps, and the plateau test over the window it chose.

    Attributes:
        envelope_slope: :func:`envelope_slope`; the theorem's claim is <= 0.
        envelope_constant: C of the envelope, None where it cannot be fixed.
        exponent: :func:`exponent`.
        window: first and last step of the looks in the last 1.5 decades.
        plateau: :func:`plateau`.
    """

    envelope_slope: Estimate
    envelope_constant: float | None
    exponent: Estimate
    window: tuple[int, int] | None
    plateau: Plateau

    def to_json(self) -> dict[str, object]:
        """Plain values, for a JSON file."""
        return {
            "envelope_slope": self.envelope_slope.to_json(),
            "envelope_constant": self.envelope_constant,
            "exponent": self.exponent.to_json(),
            "window": None if self.window is None else list(self.window),
            "plateau": {
                "trend": self.plateau.trend,
                "exponent": self.plateau.exponent.to_json(),
                "level": self.plateau.level.to_json(),
                "window": None if self.plateau.window is None else list(self.plateau.window),
                "reason": self.plateau.reason,
            },
        }


def rates(series: Series, level: float = 0.95) -> Rate:
    """Everything this module says about one run; the parts are the functions below."""
    window = window_start(series, WINDOW_DECADES)
    steps = None if isinstance(window, str) else step_range(series.since(window))
    return Rate(
        envelope_slope(series, level), envelope_constant(series), exponent(series, level), steps, plateau(series, level)
    )


def envelope(steps: Array, constant: float) -> Array:
    r"""The theorem's :math:`C \log n / \sqrt n` at n = ``steps``, ``(S,)``."""
    curve: Array = constant * np.log(steps) / np.sqrt(steps)
    return curve


def envelope_constant(series: Series) -> float | None:
    r"""C for which the envelope meets the running mean at the first stratum past :math:`e^2`, where it begins to fall.

    None where that running mean is not positive or there is none.
    """
    stops, means = series.stops, running_means(series.lengths, series.values)
    usable = np.flatnonzero((stops > math.e**2) & (means > 0.0))
    if not len(usable):
        return None
    first = usable[0]
    return float(means[first] / envelope(stops[first : first + 1], 1.0)[0])


def envelope_slope(series: Series, level: float = 0.95) -> Estimate:
    r"""Slope of :math:`\log\big(M_n / (C \log n / \sqrt n)\big)` in :math:`\log n` over the last 1.5 decades.

    :math:`M_n` is the running mean of U. C cancels. The line is fitted by least squares, each stratum weighted by the
    :math:`\Delta \log n` it spans, so that evenly spaced early strata do not outvote late ones.

    *Interval.* The :math:`M_n` share their draws, so residuals say nothing. To first order the slope is linear in the
    draws, :math:`\delta = \sum_k c_k\, \delta U_k`, :math:`c_k = \sum_{n \ge k} a_n L_k / (N_n M_n)` with a the
    regression's weights, and its variance is :func:`~bbvi_conv.monitor.strata.sampling_variance`. It is the interval
    of this trajectory's slope, for the choice of steps and the noise of U.

    Returns:
        An estimate, unavailable where the run does not span 1.5 decades or a running mean in them is not positive.
    """
    first = window_start(series, WINDOW_DECADES)
    if isinstance(first, str):
        return unavailable(first)
    means, stops = running_means(series.lengths, series.values), series.stops
    if (means[first:] <= 0.0).any():
        return unavailable(
            "the running mean of the squared gradient norm is not positive: its noise hides it, raise num_gradients"
        )
    log_n = np.log(stops[first:])
    spans = log_n - np.log(stops[first:] - series.lengths[first:]) if first else np.gradient(log_n)
    weights = spans / spans.sum()
    centred = log_n - (weights * log_n).sum()
    weights = weights * centred / (weights * centred**2).sum()  # slope = sum(weights * y)
    slope = float((weights * np.log(means[first:] / envelope(stops[first:], 1.0))).sum())

    influence = np.zeros(len(means))
    influence[first:] = weights / (stops[first:] * means[first:])
    coefficients = series.lengths * np.cumsum(influence[::-1])[::-1]
    variance, freedom = sampling_variance(series, coefficients)
    half = student_quantile(level, freedom) * math.sqrt(variance)
    return Estimate(slope, slope - half, slope + half)
