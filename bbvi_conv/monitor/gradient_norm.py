r"""Squared norm of a gradient that is only seen through noise, from the Gram matrix of J independent draws.

Everything here needs only :math:`G_{ij} = g_i^\top g_j`, shape ``(J, J)``. The Gram matrix of several groups of
parameters is the sum of theirs, so the groups and the whole cost one pass over the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bbvi_conv.monitor.intervals import Estimate, student_quantile

MIN_GRADIENTS = 4
LARGEST = 1e75
"""Entries of a Gram matrix stay below it: gradients as large as float32 can hold, and fourth powers in float64."""
_CHUNK = 1 << 18  # numbers turned into float64 and summed at a time: the more, the more rounding adds up


class SquaredNorm(NamedTuple):
    r"""What one look says about :math:`\|\nabla L\|^2`; all in squared units of the gradient.

    Attributes:
        value: the unbiased U, which may be negative.
        low, high: the interval, never negative.
        trace_sigma: :math:`\operatorname{tr}\Sigma`, unbiased; :math:`\Sigma` is the covariance of one draw.
        trace_sigma_sq: :math:`\operatorname{tr}\Sigma^2` (t2), unbiased whatever the distribution of the draws.
        noise_scale: :math:`\lambda`, the variance of one draw along the gradient, from above.
        mean_norm_sq_biased: the plain :math:`\|\bar g\|^2`, too large by :math:`\operatorname{tr}\Sigma/J` on average;
            kept for comparison only.
        num_gradients: J.
    """

    value: float
    low: float
    high: float
    trace_sigma: float
    trace_sigma_sq: float
    noise_scale: float
    mean_norm_sq_biased: float
    num_gradients: int

    @property
    def variance_slope(self) -> float:
        r""":math:`4\lambda/J`: what the variance of U gains per unit of :math:`\|\nabla L\|^2`."""
        return 4.0 * self.noise_scale / self.num_gradients

    @property
    def variance_floor(self) -> float:
        r""":math:`2 t_2 / (J(J-1))`: the variance of U where the gradient is zero."""
        return 2.0 * self.trace_sigma_sq / (self.num_gradients * (self.num_gradients - 1))

    @property
    def standard_error(self) -> float:
        """Standard error of U, taken at ``max(value, 0)``."""
        return math.sqrt(self.variance_slope * max(self.value, 0.0) + self.variance_floor)

    @property
    def estimate(self) -> Estimate:
        """Value and interval alone."""
        return Estimate(self.value, self.low, self.high)


def gram_matrix(gradients: Tensor | Iterable[Tensor]) -> Tensor:
    r""":math:`G_{ij} = g_i^\top g_j`, shape ``(J, J)``, float64, summed over the leaves given.

    Args:
        gradients: one tensor ``(J, ...)`` or the leaves of one group, each ``(J, ...)``; any floating type. Products
            are taken in float64, a chunk of columns at a time, so that a large network costs no second copy.
    Raises:
        ValueError: if there is no leaf, or leaves disagree on J.
    Example:
        >>> gram_matrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[5.0, 2.0], [2.0, 1.0]]
    """
    leaves = [gradients] if isinstance(gradients, Tensor) else list(gradients)
    if not leaves:
        raise ValueError("gradients holds no leaf; leave an empty group out instead")
    counts = sorted({leaf.shape[0] if leaf.ndim else 0 for leaf in leaves})
    if len(counts) != 1 or counts[0] == 0:
        raise ValueError(f"every leaf of gradients must have the same leading dimension J, got {counts}")
    gram = torch.zeros(counts[0], counts[0], dtype=torch.float64, device=leaves[0].device)
    for leaf in leaves:
        for columns in leaf.detach().reshape(counts[0], -1).split(max(1, _CHUNK // counts[0]), dim=1):
            wide = columns.to(torch.float64)
            gram += wide @ wide.T
    return gram


def trace_of_covariance(gram: Tensor) -> float:
    r""":math:`\operatorname{tr}\Sigma`, unbiased, from the Gram matrix ``(J, J)`` of J gradients; NaN as they are."""
    count = len(gram)
    return float(gram.trace() - gram.sum() / count) / (count - 1)


def total_gram(grams: Mapping[str, Tensor]) -> Tensor:
    """Gram matrix of all groups together, ``(J, J)``: squared norms of disjoint groups of parameters add.

    Raises:
        ValueError: if there is no group, or the groups disagree on J.
    """
    if not grams:
        raise ValueError("grams holds no group; give at least one of theta, phi, shared")
    if len({gram.shape for gram in grams.values()}) != 1:
        shapes = ", ".join(f"{name} {tuple(gram.shape)}" for name, gram in grams.items())
        raise ValueError(f"the Gram matrices of all groups must come from the same J draws, got {shapes}")
    return torch.stack([gram.to(torch.float64) for gram in grams.values()]).sum(0)


def squared_norm(gram: Tensor, level: float = 0.95) -> SquaredNorm:
    r"""Unbiased :math:`\|\nabla L\|^2` with its interval, from the Gram matrix of J i.i.d. unbiased gradients.

    .. math::

        U = \frac{\|\sum_j g_j\|^2 - \sum_j \|g_j\|^2}{J (J - 1)}, \qquad
        \operatorname{Var} U = \frac{4\, g^\top\Sigma g}{J} + \frac{2 \operatorname{tr}\Sigma^2}{J (J - 1)} .

    *Interval.* With :math:`\lambda = g^\top\Sigma g / \|g\|^2`, the set of all :math:`c \ge 0` for which U is not
    surprising, :math:`|U - c| \le z \sqrt{4 c \lambda/J + 2 t_2/(J(J-1))}`. Squared, that is a quadratic in c, whose
    roots are the ends; the variance is taken at c and not at U, so that a U that happens to be small does not claim to
    be precise. Where U < 0 the lower end is 0, and the upper end never falls below the noise band
    :math:`z \sqrt{2 t_2/(J(J-1))}`: without that floor the set would shrink to a point and then be empty as U falls
    beyond :math:`-z` standard errors, pretending knowledge that a bad draw does not give.

    *Constants.* t2 is the estimate of Himeno and Yamada, unbiased for any distribution with four moments (the usual
    Gaussian debiasing is not), and falls back to the mean squared off-diagonal of the centred Gram matrix, an
    over-estimate, in the rare case that it is not positive. z is the Student quantile with J - 1 degrees of freedom,
    since the variances are estimated from J draws. :math:`\lambda` is the largest of
    :math:`t_2/\operatorname{tr}\Sigma`, of :math:`\bar g^\top\hat\Sigma\bar g/\|\bar g\|^2`, and, where U exceeds its
    null standard error, of :math:`(\bar g^\top\hat\Sigma\bar g - t_2/J)/U`, at most
    :math:`\sqrt{t_2} \ge \lambda_{\max}(\Sigma)`. The last one is needed: the noise in :math:`\bar g` pulls the second
    towards :math:`t_2/\operatorname{tr}\Sigma`, and along the leading direction of a spectrum 1/i in 50 dimensions the
    interval without it, and with the normal quantile, covers 91%, with both 93%.

    Args:
        gram: ``(J, J)``, J >= 4.
        level: coverage of the interval.
    Raises:
        ValueError: if ``gram`` is not square, has fewer than 4 rows, or is not :func:`usable`.
    Reference: Chen and Qin (2010), https://doi.org/10.1214/09-AOS716 (U); Himeno and Yamada (2014),
        Journal of Multivariate Analysis 130, 27-44 (t2).
    Example:
        >>> look = squared_norm(torch.ones(4, 4))  # four equal gradients: no noise, no interval
        >>> look.value, look.low, look.high
        (1.0, 1.0, 1.0)
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be a square matrix (J, J), got shape {tuple(gram.shape)}")
    products = _checked(gram, LARGEST)
    along_mean = products.mean(0)  # g_j . gbar
    mean_norm_sq = float(along_mean.mean())
    centred = products - along_mean[:, None] - along_mean[None, :] + mean_norm_sq
    off_diagonal = float(products.sum() - np.trace(products))
    return _from_products(off_diagonal, along_mean, mean_norm_sq, np.diagonal(centred), _sum_sq(centred), level)


def squared_norm_of_draws(gradients: Tensor, level: float = 0.95) -> SquaredNorm:
    """:func:`squared_norm` of the Gram matrix of gradients ``(J, P)``, which is not formed where J exceeds P.

    With C the gradients less their mean, the squares in :math:`C C^T` sum to those in :math:`C^T C`, ``(P, P)``.

    Raises:
        ValueError: as :func:`squared_norm`.
    """
    count, size = gradients.shape
    if count <= size:
        return squared_norm(gram_matrix(gradients), level)
    draws = _checked(gradients, LARGEST**0.5)
    mean = draws.mean(0)
    centred, mean_norm_sq = draws - mean, float(mean @ mean)
    off_diagonal = count * count * mean_norm_sq - _sum_sq(draws)
    diagonal = np.einsum("jp,jp->j", centred, centred)
    return _from_products(off_diagonal, draws @ mean, mean_norm_sq, diagonal, _sum_sq(centred.T @ centred), level)


def _sum_sq(values: np.ndarray) -> float:
    return float(np.vdot(values, values))


def _checked(given: Tensor, largest: float) -> np.ndarray:
    """In float64; J rows, of numbers below ``largest``."""
    if len(given) < MIN_GRADIENTS:
        raise ValueError(f"num_gradients must be at least {MIN_GRADIENTS} to estimate the noise, got {len(given)}")
    if not usable(given, largest):
        raise ValueError(
            "gram holds a non-finite entry, or one whose fourth power is: a gradient at this look is not finite or "
            "beyond float32, stop the run before it"
        )
    return given.detach().to("cpu", torch.float64).numpy()


def _from_products(
    off_diagonal: float, along_mean: np.ndarray, mean_norm_sq: float, diagonal: np.ndarray, squares: float, level: float
) -> SquaredNorm:
    """From the sum of :math:`g_i^T g_j` over i != j, :math:`g_j^T \\bar g`, and the centred products.

    ``diagonal`` and ``squares`` are the diagonal ``(J,)`` and the sum of all squares of the centred Gram matrix.
    """
    count = len(along_mean)
    value = off_diagonal / (count * (count - 1))
    trace = float(diagonal.sum()) / (count - 1)
    trace_sq = _trace_sigma_sq(diagonal, squares)
    along_gradient = _sum_sq(along_mean - mean_norm_sq) / (count - 1)  # gbar' Sigma gbar

    floor = 2.0 * trace_sq / (count * (count - 1))
    scale = _noise_scale(value, trace, trace_sq, along_gradient, mean_norm_sq, floor, count)
    low, high = ends(value, 4.0 * scale / count, floor, student_quantile(level, count - 1))
    return SquaredNorm(value, low, high, max(trace, 0.0), trace_sq, scale, mean_norm_sq, count)


def usable(gram: Tensor, largest: float = LARGEST) -> bool:
    """Whether figures can be had of a Gram matrix: finite, and so are the fourth powers that their errors take."""
    return bool((gram.detach().abs() < largest).all())


def _trace_sigma_sq(diagonal: np.ndarray, squares: float) -> float:
    """Unbiased tr(Sigma^2) from the centred Gram matrix; never negative."""
    n, fourth = len(diagonal), _sum_sq(diagonal)
    of_square = squares / (n - 1) ** 2
    square_of = (float(diagonal.sum()) / (n - 1)) ** 2
    unbiased = (n - 1) / (n * (n - 2) * (n - 3)) * ((n - 1) * (n - 2) * of_square + square_of - n * fourth / (n - 1))
    return unbiased if unbiased > 0.0 else (squares - fourth) / (n * (n - 1))


def _noise_scale(
    value: float, trace: float, trace_sq: float, along: float, mean_norm_sq: float, floor: float, count: int
) -> float:
    """lambda of :func:`squared_norm`."""
    candidates = [0.0]
    if trace > 0.0:
        candidates.append(trace_sq / trace)
    if mean_norm_sq > 0.0:
        candidates.append(along / mean_norm_sq)
    if value > math.sqrt(floor) > 0.0:
        candidates.append(min((along - trace_sq / count) / value, math.sqrt(trace_sq)))
    return max(candidates)


def ends(value: float, slope: float, floor: float, z: float) -> tuple[float, float]:
    """Ends of the c >= 0 with (value - c)^2 <= z^2 (slope c + floor), widened as :func:`squared_norm` says."""
    centre = value + z * z * slope / 2
    discriminant = z * z * (z * z * slope * slope / 4 + slope * value + floor)
    root = math.sqrt(max(discriminant, 0.0))
    low = max(centre - root, 0.0) if value > 0.0 else 0.0
    return low, max(centre + root, z * math.sqrt(floor))
