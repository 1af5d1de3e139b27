"""Bring an optimiser together with a program and an objective: where the scales lie, and which pairs are sound."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from bbvi_conv.families.scale_maps import LinearScale
from bbvi_conv.objectives import ELBO, Objective
from bbvi_conv.objectives.objective import PATHWISE, STICKING
from bbvi_conv.optim import Optimiser, ProximalSGD, Scales
from bbvi_conv.program.program import Program
from bbvi_conv.program.structure import Leaf, innermost, random_sites


def is_scale(leaf: Leaf) -> bool:
    """Whether the leaf is itself a scale: the linear parameterisation."""
    return isinstance(bare_constraint(leaf), LinearScale)


def bare_constraint(leaf: Leaf) -> Any:
    """The leaf's constraint inside ``independent`` and other wrappers."""
    constraint: Any = leaf.constraint
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return constraint


def scales_of(program: Program, entropy: float = 1.0) -> Scales:
    """Where the scales of linear parameterisations lie in the flat parameters."""
    parts: list[tuple[int, bool]] = []
    for leaf, size in zip(program.leaves, program.sizes, strict=True):
        found = is_scale(leaf)
        if parts and parts[-1][1] == found:
            parts[-1] = (parts[-1][0] + size, found)
        else:
            parts.append((size, found))
    return Scales(tuple(parts), entropy)


def bind(optimiser: Optimiser, program: Program, objective: Objective, normaliser: float) -> Optimiser:
    """The optimiser, told where the scales lie; any other than one of the library's is left as it is.

    Raises:
        ValueError: an optimiser about scales and a program without any, or a proximal step on a gradient that it does
            not take, with the way out.
    """
    told: Any = optimiser
    if not getattr(told, "needs_scales", False):
        return optimiser
    if isinstance(optimiser, ProximalSGD):
        _check_energy(optimiser, objective)
    scales = scales_of(program, _entropy_weight(objective) / normaliser)
    if not any(are_scales for _, are_scales in scales.parts):
        raise ValueError(
            f"{type(optimiser).__name__} acts on scales that are parameters themselves, and the guide has none; use a "
            "family with scale_map=bc.Linear(), or another optimiser"
        )
    if isinstance(optimiser, ProximalSGD):
        _check_entropy(program, scales)
    bound: Optimiser = told.bind(scales)
    return bound


def _entropy_weight(objective: Objective) -> float:
    return 1.0 if callable(objective.kl_weight) else float(objective.kl_weight)


def _check_energy(optimiser: ProximalSGD, objective: Objective) -> None:
    """A proximal step needs an energy gradient, which is had from the gradient of an ELBO of constant weight only."""
    if not isinstance(objective, ELBO):
        raise ValueError(
            f"ProximalSGD needs the ELBO, whose entropy stands apart from the energy; {type(objective).__name__} has "
            "no such parts: use ProjectedSGD"
        )
    if callable(objective.kl_weight):
        raise ValueError("ProximalSGD needs a constant kl_weight: use a number, or ProjectedSGD")
    if objective.estimator == STICKING and not optimiser.control_variate:
        raise ValueError(
            "ProximalSGD takes the energy gradient: a sticking-the-landing gradient holds the entropy's as well, and "
            "the proximal step would count it twice (the scale of a standard normal then settles at 1.44); use "
            "ProximalSGD(control_variate=True), which keeps only its zero-mean part, or ProjectedSGD"
        )
    if optimiser.control_variate and objective.estimator == PATHWISE:
        raise ValueError(
            'ProximalSGD(control_variate=True) needs ELBO(estimator="sticking-the-landing"), whose difference from '
            "the pathwise gradient is the control variate; use that estimator, or control_variate=False"
        )


def _check_entropy(program: Program, scales: Scales) -> None:
    """The entropy must depend on every scale s as log s, at some point that is not the start."""
    if program.unit_scale != 1.0:
        raise ValueError(
            "ProximalSGD needs the whole entropy at every step, and the scales of rows outside a minibatch are not in "
            "it: use ProjectedSGD, or all rows"
        )
    x = program.initial()
    x = x * (1 + 0.1 * torch.sin(torch.arange(len(x), dtype=x.dtype, device=x.device))) + 0.01
    found = scales.of(_log_q_gradient(program, x))
    wanted = -1 / scales.of(x)
    if not torch.allclose(found, wanted, rtol=1e-3):
        raise ValueError(
            "ProximalSGD needs a guide whose entropy is the sum of the logarithms of its scales, and this guide's is "
            "not: use MeanField or FullRank with scale_map=bc.Linear(), or ProjectedSGD"
        )


def _log_q_gradient(program: Program, x: Tensor) -> Tensor:
    """Gradient of log q along its own draw, on the unconstrained space: point masses and their volumes left out."""
    with torch.enable_grad(), program.networks_kept():
        x = x.detach().requires_grad_()
        drawn = random_sites(program.drawn(x, *program.example()))
        sites = [site for site in drawn if not isinstance(innermost(site["fn"]), Delta)]
        (grad,) = torch.autograd.grad(sum((site["log_prob_sum"] for site in sites), 0.0 * x.sum()), x)
    return grad
