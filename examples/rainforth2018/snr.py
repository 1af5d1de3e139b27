r"""Signal-to-noise ratios, distances and slopes from sums over batches, with jackknife intervals.

With R estimates g_r of P parameters and covariance Sigma,

.. math::
    U = \frac{\|\sum_r g_r\|^2 - \sum_r \|g_r\|^2}{R (R - 1)}, \qquad E[U] = \|E g\|^2, \qquad
    \text{SNR} = \sqrt{U / \operatorname{tr} \Sigma}.

The noise floor is the SNR that a gradient with mean zero would show, one standard deviation of U high: its
variance is then 2 tr(Sigma^2) / (R (R - 1)). Intervals leave out one batch at a time; a slope is refitted each time,
so that the correlation between points from the same draws is in its interval.

Sources: Rainforth et al. (2018), section 3; Efron and Stein (1981), "The jackknife estimate of variance".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bbvi_conv.monitor.intervals import Estimate, student_quantile, unavailable

LEVEL = 0.95
FLOORS = 3.0
"""Points lower than so many noise floors enter no slope."""


class Curve(NamedTuple):
    """Aggregate SNR at every number of draws ``x``.

    ``value`` and ``floor``: ``(J,)``. ``left_out``: ``(S, J)``, the SNR without one batch. U below zero counts as zero.
    """

    x: np.ndarray
    value: np.ndarray
    floor: np.ndarray
    left_out: np.ndarray

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends, each ``(J,)``."""
        half = _half_width(self.left_out)
        return np.maximum(self.value - half, 0.0), self.value + half


class Slope(NamedTuple):
    """A log-log slope, the window asked for, and the points that were left in it."""

    estimate: Estimate
    window: tuple[float, float]
    points: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self.estimate.to_json(), "window": list(self.window), "points": list(self.points)}


def aggregate(total: Tensor, norms: Tensor, count: int) -> np.ndarray:
    """sqrt(U / tr Sigma) from sums ``(..., P)`` and ``(...)`` over ``count`` estimates."""
    return np.sqrt(np.maximum(_signal(total, norms, count), 0.0) / _noise(total, norms, count))


def curve(x: Sequence[int], total: Tensor, norms: Tensor, count: int) -> Curve:
    """SNR against ``x`` from sums of S batches, ``(S, J, P)`` and ``(S, J)``, each over ``count`` estimates."""
    batches = len(total)
    all_total, all_norms, runs = total.sum(0), norms.sum(0), batches * count
    value = aggregate(all_total, all_norms, runs)
    left_out = aggregate(all_total - total, all_norms - norms, runs - count)
    spread = np.sqrt(2 * _trace_of_square(total / count, count) / (runs * (runs - 1)))
    floor = np.sqrt(spread / _noise(all_total, all_norms, runs))
    return Curve(np.asarray(x, dtype=float), value, floor, left_out)


def per_parameter(total: Tensor, squares: Tensor, count: int) -> np.ndarray:
    """|mean| / standard deviation of each parameter: sums ``(S, J, P)`` over ``count`` each -> ``(J, P)``."""
    runs = len(total) * count
    mean = total.sum(0) / runs
    variance = (squares.sum(0) / runs - mean.square()) * (runs / (runs - 1))
    return (mean.abs() / variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()).numpy()


def squared_distance(total: Tensor, norms: Tensor, count: int, reference: Tensor) -> np.ndarray:
    """E ||g - reference||^2 from sums ``(..., P)`` and ``(...)`` over ``count`` estimates."""
    mean = total / count
    return (norms / count - 2 * mean @ reference + reference.square().sum()).numpy()


def squared_bias(total: Tensor, norms: Tensor, count: int, reference: Tensor) -> np.ndarray:
    """||E g - reference||^2, unbiased, so that it may be below zero."""
    return squared_distance(total, norms, count, reference) - _noise(total, norms, count)


def slope(curve: Curve, window: tuple[float, float]) -> Slope:
    """Least-squares slope of log SNR against log x inside ``window``, points under three noise floors dropped."""
    keep = (curve.value > FLOORS * curve.floor) & _inside(curve.x, window)
    return fit_slope(curve.x, curve.value, curve.left_out, keep, window)


def fit_slope(
    x: np.ndarray, value: np.ndarray, left_out: np.ndarray, keep: np.ndarray, window: tuple[float, float]
) -> Slope:
    """Slope over the places ``keep``, with its jackknife interval; at least three points."""
    points = tuple(float(point) for point in x[keep])
    if len(points) < 3:
        return Slope(
            unavailable(f"only {len(points)} points lie in the window and above the noise floor: draw more estimates"),
            window,
            points,
        )
    if (left_out[:, keep] <= 0).any():
        return Slope(unavailable("a point vanishes when one batch is left out: draw more estimates"), window, points)
    logs = np.log(x[keep])
    weights = (logs - logs.mean()) / np.square(logs - logs.mean()).sum()
    found = float(np.log(value[keep]) @ weights)
    half = float(_half_width(np.log(left_out[:, keep]) @ weights))
    return Slope(Estimate(found, found - half, found + half), window, points)


def jackknife(
    statistic: Callable[[Tensor, Tensor, int], np.ndarray], total: Tensor, norms: Tensor, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic of (total, norms, count), its half width, and its values without one batch ``(S, ...)``."""
    runs = len(total) * count
    value = statistic(total.sum(0), norms.sum(0), runs)
    left_out = statistic(total.sum(0) - total, norms.sum(0) - norms, runs - count)
    return value, _half_width(left_out), left_out


def cosine(total: Tensor, norms: Tensor, count: int, direction: Tensor) -> np.ndarray:
    """Cosine of E g to a direction; the length of E g is taken without its noise, so the cosine is not biased down."""
    along = (total / count) @ (direction / direction.norm())
    return along.numpy() / np.sqrt(np.maximum(_signal(total, norms, count), np.finfo(float).tiny))


def length(total: Tensor, norms: Tensor, count: int) -> np.ndarray:
    """||E g|| without its noise."""
    return np.sqrt(np.maximum(_signal(total, norms, count), 0.0))


def random_ratio(size: int) -> float:
    """E ||par|| / ||perp|| of a standard normal vector in ``size`` dimensions to any fixed direction, exact."""
    log_inverse_chi = math.lgamma((size - 2) / 2) - math.lgamma((size - 1) / 2) - math.log(2) / 2
    return math.sqrt(2 / math.pi) * math.exp(log_inverse_chi)


def _signal(total: Tensor, norms: Tensor, count: int) -> np.ndarray:
    return ((total.square().sum(-1) - norms) / (count * (count - 1))).numpy()


def _noise(total: Tensor, norms: Tensor, count: int) -> np.ndarray:
    """tr Sigma."""
    return ((norms - total.square().sum(-1) / count) / (count - 1)).numpy()


def _trace_of_square(means: Tensor, count: int) -> np.ndarray:
    """tr(Sigma^2), unbiased, from batch means ``(S, J, P)``: differences of pairs of batches have no mean."""
    apart = (means[0::2] - means[1::2]).transpose(0, 1)  # (J, S / 2, P), each of covariance 2 Sigma / count
    gram = (apart @ apart.mT).square()
    pairs = apart.shape[1]
    off = gram.sum((-2, -1)) - gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (off / (pairs * (pairs - 1)) * count**2 / 4).numpy()


def _half_width(left_out: np.ndarray) -> np.ndarray:
    batches = len(left_out)
    error = np.sqrt((batches - 1) / batches * np.square(left_out - left_out.mean(0)).sum(0))
    return student_quantile(LEVEL, batches - 1) * error


def _inside(x: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    return (x >= window[0]) & (x <= window[1])
