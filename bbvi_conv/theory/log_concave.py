"""Log-concavity: known forms prove it, Hessians at draws refute it, and otherwise it is not known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent

from bbvi_conv.program.structure import random_sites
from bbvi_conv.theory.target import Target

DENSE = 60
"""Dimensions up to which whole Hessians are formed; beyond, curvature along random directions."""
DIRECTIONS = 8
PAIRS = 6

Parts = Callable[[Any], tuple[list[Tensor], list[Tensor]]]
"""Distribution -> (parameters that must be affine in the latents, parameters that must not depend on them)."""


def _located(scale: str) -> Parts:
    return lambda d: ([d.loc], [getattr(d, scale)])


_LOCATED: dict[type, Parts] = {
    dist.Normal: _located("scale"),
    dist.Laplace: _located("scale"),
    dist.Logistic: _located("scale"),
    dist.Gumbel: _located("scale"),
    dist.MultivariateNormal: _located("scale_tril"),
}
"""Log-concave in the value and the location together."""

_POSITIVE: dict[type, Parts] = {
    dist.HalfNormal: lambda d: ([], [d.scale]),
    dist.HalfCauchy: lambda d: ([], [d.scale]),
    dist.Exponential: lambda d: ([], [d.rate]),
    dist.Gamma: lambda d: ([], [d.concentration, d.rate]),
    dist.InverseGamma: lambda d: ([], [d.concentration, d.rate]),
    dist.LogNormal: lambda d: ([d.loc], [d.scale]),
}
"""Log-concave in the logarithm of the value, which is its unconstrained form."""

_OBSERVED: dict[type, Parts] = _LOCATED | {
    dist.Bernoulli: lambda d: ([d.logits], []),
    dist.Binomial: lambda d: ([d.logits], [d.total_count]),
    dist.Categorical: lambda d: ([d.logits - d.logits[..., :1]], []),
    dist.NegativeBinomial: lambda d: ([d.logits], [d.total_count]),
    dist.Poisson: lambda d: ([d.rate.log()], []),
    dist.Exponential: lambda d: ([d.rate.log()], []),
    dist.Gamma: lambda d: ([d.rate.log()], [d.concentration]),
}
"""Log-concave in these parameters at any data."""


def unknown_form(target: Target) -> str:
    """Empty if every site is of a form whose joint log density is concave; else which site is not, and why.

    Sums of concave functions of affine functions are concave. Whether a parameter is affine in the latents is read off
    its values at random points: a violation shows at almost every one of them.
    """
    generator = torch.Generator().manual_seed(0)
    spread = (2, PAIRS, target.dim)
    ends = target.first + 2 * torch.randn(spread, generator=generator, dtype=target.first.dtype).to(target.first.device)
    middle = ends.mean(0)
    with torch.no_grad():
        traces = [[target.trace(zeta) for zeta in points] for points in (ends[0], ends[1], middle)]
    for site in random_sites(traces[0][0]):
        name, latent = site["name"], target.is_latent(site["name"])
        table = _LOCATED | _POSITIVE if latent else _OBSERVED
        kind = type(_bare(site["fn"]))
        if kind not in table:
            return f"site {name!r} is {kind.__name__}, which is no known log-concave form here"
        for first, second, between in zip(*traces, strict=True):
            values = [table[kind](_bare(trace.nodes[name]["fn"])) for trace in (first, second, between)]
            (affine_1, fixed_1), (affine_2, fixed_2), (affine_m, _) = values
            if not all(_close(a, b) for a, b in zip(fixed_1, fixed_2, strict=True)):
                return f"a parameter of site {name!r} ({kind.__name__}) other than its location depends on a latent"
            if not all(_close(0.5 * (a + b), m) for a, b, m in zip(affine_1, affine_2, affine_m, strict=True)):
                return (
                    f"the location or natural parameter of site {name!r} ({kind.__name__}) is not affine in the latents"
                )
    return ""


def _bare(distribution: Any) -> Any:
    while isinstance(distribution, Independent | MaskedDistribution):
        distribution = distribution.base_dist
    return distribution


def _close(a: Tensor, b: Tensor) -> bool:
    slack = 1e3 * torch.finfo(a.dtype).eps
    return bool(((a - b).abs() <= slack * (1 + a.abs() + b.abs())).all())


class Probes(NamedTuple):
    """Curvature of log p at points.

    Attributes:
        points: how many.
        largest: largest second derivative along any direction tried; positive where log p is not concave.
        smallest: smallest.
        witness: the first point where it is positive, in words; empty if there is none.
    """

    points: int
    largest: float
    smallest: float
    witness: str


def probe(target: Target, points: Sequence[Tensor]) -> Probes:
    """Eigenvalues of the Hessian of log p at the given points, or second derivatives along random directions."""
    largest, smallest, witness = -torch.inf, torch.inf, ""
    generator = torch.Generator().manual_seed(1)
    for zeta in points:
        values, directions = _curvatures(target, zeta, generator)
        if not bool(values.isfinite().all()):
            continue
        top = int(values.argmax())
        if not witness and float(values[top]) > 1e-7 * float(values.abs().max()):
            direction = directions[top]
            main = int(direction.abs().argmax())
            witness = (
                f"log p has second derivative {float(values[top]):+.3g} at {_described(target, zeta)}, along a "
                f"direction that is mostly {target.coordinate(main)}"
            )
        largest, smallest = max(largest, float(values[top])), min(smallest, float(values.min()))
    return Probes(len(points), largest, smallest, witness)


def _curvatures(target: Target, zeta: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Second derivatives and the unit directions they are along, in rows."""
    with torch.enable_grad():
        zeta = zeta.detach().requires_grad_()
        (grad,) = torch.autograd.grad(target(zeta), zeta, create_graph=True)
        if not grad.requires_grad:
            return zeta.new_zeros(1), torch.eye(1, target.dim, dtype=zeta.dtype, device=zeta.device)
        if target.dim <= DENSE:
            rows = [torch.autograd.grad(g, zeta, retain_graph=True, allow_unused=True)[0] for g in grad]
            hessian = torch.stack([torch.zeros_like(zeta) if row is None else row for row in rows])
            if not bool(hessian.isfinite().all()):
                return hessian[0], hessian
            values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.T))
            return values, vectors.T
        directions = torch.randn(DIRECTIONS, target.dim, generator=generator, dtype=zeta.dtype).to(zeta.device)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        products = [torch.autograd.grad(grad @ v, zeta, retain_graph=True)[0] @ v for v in directions]
        return torch.stack(products), directions


def _described(target: Target, zeta: Tensor) -> str:
    shown = [f"{target.coordinate(i)} = {float(zeta[i]):.3g}" for i in range(min(4, target.dim))]
    return "unconstrained " + ", ".join(shown) + (", ..." if target.dim > 4 else "")
