r"""Gradients of many bounds on one set of draws, written by hand for the Gaussian model.

Each gradient is linear in the noise with self-normalised weights. With d_n, s and e_nk as in the model's file,
v_k proportional to w_k^(1 - alpha) over the first K draws, and G = d bound / d (A x_n + b),

.. math::
    \text{pathwise:} \quad & G = -2 d_n - 2 s \sum_k v_k e_k, \\
    \text{doubly reparameterised:} \quad
    & G = \sum_k (\alpha v_k + (1 - \alpha) v_k^2) (-2 d_n + (1/s - 2 s) e_k), \\
    \text{theta:} \quad & d\,\text{bound} / d\mu = A x_n + b - \mu + s \sum_k v_k e_k,

and grad_b = mean_n G_n, grad_A = mean_n G_n x_n'. The pathwise one is the whole derivative, the density's own score
included: log q at fixed noise does not depend on phi here. alpha = 0 is IWAE. One set of draws serves every K (its
first K), every M and every estimator, so that estimates at different K are correlated.

Sources: Rainforth et al. (2018), section 4; Tucker et al. (2019), "Doubly reparameterized gradient estimators",
https://arxiv.org/abs/1810.04152, section 4; Daudel et al. (2023), "Alpha-divergence variational inference meets
importance weighted auto-encoders", https://arxiv.org/abs/2210.06226, section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALPHAS = (0.0, 0.2, 0.5)
GROUP = 8
"""K of the MIWAE(M, K) that is drawn against the number of draws M K."""

WEIGHTED, SQUARED, SHRUNK, PLAIN, GROUPED = 0, len(ALPHAS), 2 * len(ALPHAS), 3 * len(ALPHAS), 3 * len(ALPHAS) + 1
ROWS = GROUPED + 1
"""Rows of :func:`vectors`: sum v e, sum v^2 e and d sum v^2, each for all alphas; mean of e; mean over groups."""


@dataclass(frozen=True)
class Estimator:
    """A gradient as a linear form: ``constant`` times a known vector (d, or A x + b - mu) plus ``rows``.

    ``group`` is K where the draws are split into groups of K, else None; only multiples of it are numbers of draws.
    """

    name: str
    constant: float
    rows: dict[int, float]
    group: int | None = None

    def counts(self, ends: Sequence[int]) -> list[int]:
        """Places in ``ends`` where this estimator is defined."""
        return [place for place, end in enumerate(ends) if end % (self.group or 1) == 0]


def phi_estimators(scale: float) -> tuple[Estimator, ...]:
    """All estimators of the gradient for phi, at the guide's standard deviation ``scale``."""
    path = 1 / scale - 2 * scale
    found = [
        Estimator("vae", -2.0, {PLAIN: -2 * scale}, 1),
        Estimator("piwae", -2.0, {GROUPED: -2 * scale}, GROUP),
    ]
    for i, alpha in enumerate(ALPHAS):
        name = _name(alpha)
        found.append(Estimator(name, -2.0, {WEIGHTED + i: -2 * scale}))
        rest = 1 - alpha
        rows = {WEIGHTED + i: alpha * path, SQUARED + i: rest * path, SHRUNK + i: -2 * rest}
        found.append(Estimator("dreg" if alpha == 0 else f"{name}_dreg", -2 * alpha, rows))
    return tuple(found)


def theta_estimators(scale: float) -> tuple[Estimator, ...]:
    """All estimators of the gradient for theta; PIWAE's is that of IWAE on all M K draws."""
    weighted = [Estimator(_name(alpha), 1.0, {WEIGHTED + i: scale}) for i, alpha in enumerate(ALPHAS)]
    return (Estimator("vae", 1.0, {PLAIN: scale}, 1), *weighted)


def _name(alpha: float) -> str:
    return "iwae" if alpha == 0 else f"vr{round(10 * alpha):02d}"


def combine(estimators: Sequence[Estimator], rows: Tensor, constant: Tensor) -> Tensor:
    """Gradients ``(E, *shape)`` of E estimators from ``rows`` ``(ROWS, *shape)``; ``constant`` broadcasts to shape."""
    table = rows.new_zeros(len(estimators), ROWS)
    for place, estimator in enumerate(estimators):
        for row, factor in estimator.rows.items():
            table[place, row] = factor
    mixed: Tensor = torch.tensordot(table, rows, dims=1)
    factors = rows.new_tensor([estimator.constant for estimator in estimators])
    return mixed + factors.reshape(-1, *[1] * (rows.dim() - 1)) * constant


def log_weights(noise: Tensor, squares: Tensor, gap: Tensor, scale: float) -> Tensor:
    """log w up to a constant, ``(n, T)``, from ``noise`` ``(n, T, D)``, ``squares`` |e|^2 and ``gap`` d ``(n, D)``."""
    along = torch.matmul(noise, gap[:, :, None])[..., 0]
    return -2 * scale * along - (scale**2 - 0.5) * squares


def vectors(noise: Tensor, log_w: Tensor, gap: Tensor, ends: Sequence[int]) -> Tensor:
    """The rows that all gradients are made of, over the first K draws for every K in ``ends``.

    Sums run over the stretches between one K and the next, each scaled by its own largest weight, so that nothing
    underflows that matters; the stretches are then added up.

    Args:
        noise: e, ``(n, T, D)``.
        log_w: ``(n, T)``, up to a constant per datum.
        gap: d, ``(n, D)``.
        ends: increasing numbers of draws; the last is at most T.
    Returns:
        ``(ROWS, n, J, D)`` for J ends. The grouped row is zero where :data:`GROUP` does not divide the number of draws.
    """
    starts = (0, *ends[:-1])
    pieces = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
    sizes = noise.new_tensor([end - start for start, end in zip(starts, ends, strict=True)], dtype=torch.long)
    peak = torch.stack([log_w[:, piece].amax(-1) for piece in pieces], -1)  # (n, J)
    log_w = log_w[:, : ends[-1]]
    relative = log_w - peak.repeat_interleave(sizes, dim=-1, output_size=ends[-1])
    weights = noise.new_empty(len(log_w), 2 * len(ALPHAS) + 2, ends[-1])
    one, two = slice(0, len(ALPHAS)), slice(len(ALPHAS), 2 * len(ALPHAS))
    for i, alpha in enumerate(ALPHAS):
        torch.mul(relative, 1 - alpha, out=weights[:, i]).exp_()
    torch.square(weights[:, one], out=weights[:, two])
    weights[:, -2] = 1.0
    _within_groups(log_w, weights[:, -1])
    sums = torch.stack([weights[..., piece] @ noise[:, piece] for piece in pieces], 2)  # (n, 8, J, D)
    masses = torch.stack([weights[..., piece].sum(-1) for piece in pieces], 2)  # (n, 8, J)

    power = noise.new_tensor([1 - alpha for alpha in ALPHAS] + [2 * (1 - alpha) for alpha in ALPHAS] + [0.0, 0.0])
    lift = peak[:, None, :] - peak.cummax(-1).values[:, :, None]  # (n, to, from), at most 0 where from <= to
    later = torch.ones(len(ends), len(ends), dtype=torch.bool, device=noise.device).triu(1)
    scales = (power[:, None, None] * lift[:, None].masked_fill(later, 0.0)).exp().masked_fill(later, 0.0)
    sums, masses = scales @ sums, (scales @ masses[..., None])[..., 0]  # (n, 8, J, D) and (n, 8, J), over all before

    mass = masses[:, one]
    shrink = masses[:, two] / mass.square()
    draws = noise.new_tensor(ends)
    groups = torch.where(draws % GROUP == 0, GROUP / draws, 0.0)
    rows = [
        sums[:, one] / mass[..., None],
        sums[:, two] / mass.square()[..., None],
        shrink[..., None] * gap[:, None, None, :],
        sums[:, -2:-1] / draws[:, None],
        sums[:, -1:] * groups[:, None],
    ]
    return torch.cat(rows, 1).movedim(1, 0)


def contract(rows: Tensor, design: Tensor) -> Tensor:
    """Sum over data of rows times ``design`` ``(n, p)``: ``(ROWS, n, J, D)`` -> ``(ROWS, J, D, p)``."""
    return torch.einsum("rnjd,np->rjdp", rows, design)


def _within_groups(log_w: Tensor, out: Tensor) -> None:
    """Weights that sum to one within every group of :data:`GROUP` draws; zero in an unfinished last group."""
    whole = log_w.shape[-1] // GROUP * GROUP
    out[:, whole:] = 0.0
    members = log_w[:, :whole].unflatten(-1, (-1, GROUP)).unbind(-1)
    peak = functools.reduce(torch.maximum, members)
    weights = [(member - peak).exp_() for member in members]
    mass = sum(weights[1:], weights[0])
    for place, weight in enumerate(weights):
        torch.div(weight, mass, out=out[:, place:whole:GROUP])
