r"""Distance from the nearest stationary point, in nats: two numbers from two metrics, and the paired improvement.

Everything here is judged at one point, the parameters that are returned, from the J gradients g_j there and a matrix
from draws independent of them:

* :math:`\tfrac12 g^\top F^{-1} g`, F the Fisher information of q, the ``natural_gradient_norm``;
* :math:`\tfrac12 g^\top H^{-1} g`, H the Hessian of the loss, the ``remaining_gap``.

Both are U-statistics, so the noise of the gradients does not bias them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from bbvi_conv.monitor.gradient_norm import squared_norm_of_draws
from bbvi_conv.monitor.intervals import Estimate, student_quantile, unavailable

DENSE = 2000
"""Parameters up to which the matrix is formed; beyond, at most ``PRODUCTS`` conjugate-gradient products."""
PRODUCTS = 50
SCALINGS = (2, 2, 2, 8)
"""Products in each of the rounds that find the scale of every parameter before."""
RESIDUAL = 0.05
"""Relative residual at which the conjugate-gradient solution is accepted,"""
DELAY, GAIN = 4, 0.01
"""where so many products have not added more than this share to the distance."""

CUT_OFF = (
    "every gradient is exactly zero though the loss depends on the draw: a saturated or clipped layer has cut all "
    "parameters off"
)
"""Why there is no distance where nothing can move any more, which is not the same as to have arrived."""

Products = Callable[[Tensor], Tensor]
"""Vectors ``(R, P)`` to the products ``(R, P)`` of a symmetric A with each."""


def rounding_error(size: Tensor, dtype: torch.dtype) -> float:
    """What rounding alone can make of the difference of two log densities of this size; infinite ones are apart."""
    return 64.0 * torch.finfo(dtype).eps * max(1.0, float(finite_size(size)))


def finite_size(values: Tensor) -> Tensor:
    """The largest size of the numbers that are finite; 0 without any."""
    return torch.where(values.isfinite(), values, 0.0).abs().max()


def half_norm(gradients: Tensor, matrix: Tensor, name: str, *, level: float = 0.95) -> Estimate:
    r"""U-statistic of :math:`\tfrac12 g^\top A^{-1} g` for a dense symmetric A, with its interval.

    With :math:`A = L L^\top` it is half the squared norm of the gradients :math:`L^{-1} g_j`.

    Args:
        gradients: J independent gradients ``(J, P)``.
        matrix: A ``(P, P)``, from draws independent of them.
        name: what A is, for the reason when it is not positive definite.
        level: coverage of the interval.
    """
    if not bool(torch.isfinite(matrix).all()):
        return unavailable(
            f"{name} is not finite: torch's second derivative of some operation is not, as that of logaddexp or "
            "logsumexp at minus infinity; put a large finite number in its place"
        )
    factor, info = torch.linalg.cholesky_ex(matrix.to(torch.float64))
    if int(info) != 0 or not bool(torch.isfinite(factor).all()):
        return unavailable(f"{name} is not positive definite here")
    white = torch.linalg.solve_triangular(factor, gradients.to(torch.float64).T, upper=False)
    norm = squared_norm_of_draws(white.T, level)
    return Estimate(norm.value / 2, norm.low / 2, norm.high / 2)


def half_norm_by_products(
    gradients: Tensor, products: Products, scale: Tensor, name: str, *, level: float = 0.95
) -> Estimate:
    r"""The same for an A known by its products: half of :math:`\bar g_a^\top A^{-1} \bar g_b` for two halves a, b.

    One conjugate-gradient solve for the mean of each half, by the :func:`equilibration` ``scale`` of A; the halves are
    independent, so the product is unbiased. Both halves move it: its variance is the sum of that of
    :math:`\tfrac12 g_i^\top A^{-1} \bar g_b` over the first and of its mirror image over the second, each with the
    other half held fixed.
    """
    half = len(gradients) // 2
    first, second = gradients[:half].to(torch.float64), gradients[half : 2 * half].to(torch.float64)
    solved = conjugate_gradients(products, torch.stack([first.mean(0), second.mean(0)]).to(gradients.dtype), scale)
    if isinstance(solved, str):
        return unavailable(f"{name} {solved}")
    by_first, by_second = solved.to(torch.float64)
    parts = 0.5 * (first @ by_second), 0.5 * (second @ by_first)
    value = 0.5 * float(parts[0].mean() + parts[1].mean())
    error = math.sqrt(float(parts[0].var() + parts[1].var()) / half)
    width = student_quantile(level, half - 1) * error
    return Estimate(value, max(value - width, 0.0), max(value + width, width))


def conjugate_gradients(products: Products, b: Tensor, scale: Tensor) -> Tensor | str:
    r"""Solve A x = b for each row of ``b`` ``(R, P)`` with at most ``PRODUCTS`` products, or say in words why not.

    Preconditioned by D, the ``scale`` of the parameters: without, what some of them have to themselves hardly counts in
    the residual r. A row is solved where :math:`r^\top D^{-1} r < 0.05^2\, b^\top D^{-1} b` and the last four products
    added less than 1% to :math:`b^\top x`, for a small residual along directions of little curvature may be most of it.
    What a product adds is what the error :math:`(x - A^{-1} b)^\top A (x - A^{-1} b)` loses.

    Source: Hestenes and Stiefel (1952); Strakos and Tichy (2002), On error estimation in the conjugate gradient method.
    """
    if not bool(scale.isfinite().all()):
        return "has products that are not finite"
    x, residual, direction = torch.zeros_like(b), b.clone(), b / scale
    square = (residual * direction).sum(-1)
    start, left = square, square != 0
    totals = [torch.zeros_like(square)] * (DELAY + 1)  # of b' x, the newest last
    for made in itertools.count():
        if not bool(left.any()):
            return x
        if made == PRODUCTS:
            break
        image = products(direction)
        curvature = (direction * image).sum(-1)
        if not bool((curvature > 0)[left].all()):
            return "is not positive definite on the directions used"
        step = torch.where(left, square / curvature, 0.0)
        totals = [*totals[1:], totals[-1] + step * square]
        x, residual = x + step.unsqueeze(-1) * direction, residual - step.unsqueeze(-1) * image
        new = (residual.square() / scale).sum(-1)
        solved = (new < RESIDUAL**2 * start) & (totals[-1] - totals[0] < GAIN * totals[-1])
        left = left & ~(solved | (new <= (64 * torch.finfo(b.dtype).eps) ** 2 * start))
        turn = torch.where(left, new / square, 0.0).unsqueeze(-1)
        direction, square = residual / scale + turn * direction, new
    return f"was not solved to {RESIDUAL:.0%} in {PRODUCTS} products: too ill-conditioned for a gap in nats"


def equilibration(products: Products, like: Tensor) -> Tensor:
    r"""D ``(P,)``, positive, with rows of :math:`D^{-1/2} A D^{-1/2}` of norm about one: units do not matter then.

    Four times D is multiplied by those norms, as vectors v of random signs tell them: in mean :math:`(A v)_i^2` is the
    squared norm of row i. It takes eight of them in the end: in the sum of a few large entries signs may cancel. Of a
    diagonal A it is the diagonal, where that spans fewer than ten decades.

    Source: Ruiz (2001), RAL-TR-2001-034; by products of random vectors Bradley and Murray (2012), arXiv:1110.2805.
    """
    generator, d = torch.Generator().manual_seed(0), torch.ones_like(like)
    for count in SCALINGS:
        signs = torch.randint(0, 2, (count, len(d)), generator=generator, device="cpu") * 2 - 1
        rows = products(signs.to(d) * d.rsqrt()) * d.rsqrt()
        largest = rows.abs().max().clamp(min=torch.finfo(d.dtype).tiny)  # so that no square overflows
        d = d * (rows / largest).square().mean(0).sqrt() * largest
        d = d.clamp(min=max(float(d.max()) * 1e-10, torch.finfo(d.dtype).tiny))
    return d


def paired_improvement(before: Tensor, after: Tensor, *, level: float = 0.95) -> Estimate:
    r"""Mean of :math:`\ell_s(\text{before}) - \ell_s(\text{after})` over common random numbers, and its interval.

    Positive when the newer parameters have the lower loss. Losses ``(S,)``, the same noise and rows at each s.
    """
    difference = (before - after).to(torch.float64)
    if not bool(torch.isfinite(difference).all()):
        return unavailable("a loss is not finite at the parameters compared: lower the step size")
    value = float(difference.mean())
    width = student_quantile(level, len(difference) - 1) * float(difference.std()) / math.sqrt(len(difference))
    return Estimate(value, value - width, value + width)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate in other units."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return estimate
    return estimate._replace(value=factor * estimate.value, low=factor * estimate.low, high=factor * estimate.high)
