"""The smallest eigenvalue of q's covariance: is it bounded away from zero, and by what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from bbvi_conv.binding import bare_constraint, is_scale
from bbvi_conv.families.scale_maps import SoftClippedScale
from bbvi_conv.networks.constants import constants
from bbvi_conv.optim import Optimiser, Projected, ProximalSGD, ScaleFloor
from bbvi_conv.program.program import Program
from bbvi_conv.program.structure import Leaf, innermost, random_sites
from bbvi_conv.theory.condition import Condition
from bbvi_conv.theory.modules import networks
from bbvi_conv.theory.steps import radius

NAME = "scales bounded away from zero"


def conditions(program: Program, optimiser: Optimiser, x: Tensor, theorem: str) -> Iterator[Condition]:
    """One condition for every leaf that is a scale, and one for scales that networks put out."""
    named = program.constrained(x)
    for leaf in program.leaves:
        if leaf.group == "phi" and _is_scale(leaf):
            yield _of_leaf(leaf, float(named[leaf.name].abs().min()), optimiser, theorem)
    encoders = [network for network in networks(program) if network.side == "guide"]
    if encoders:
        yield _of_networks(program, [network.module for network in encoders], x, theorem)


def _is_scale(leaf: Leaf) -> bool:
    kinds = (SoftClippedScale, type(constraints.positive), type(constraints.softplus_positive))
    return is_scale(leaf) or isinstance(bare_constraint(leaf), kinds)


def _of_leaf(leaf: Leaf, least: float, optimiser: Optimiser, theorem: str) -> Condition:
    constraint, now = bare_constraint(leaf), f"the smallest is {least:.3g} now"
    if is_scale(leaf):
        if isinstance(optimiser, Projected) and isinstance(optimiser.onto, ScaleFloor):
            why = f"projected onto scales of at least {optimiser.onto.floor:g}; {now}"
            return Condition(theorem, NAME, "holds", leaf.name, why)
        if isinstance(optimiser, ProximalSGD):
            why = f"a proximal step keeps them positive, but by no fixed amount; {now}"
            return Condition(theorem, NAME, "unknown", leaf.name, why)
        why = "a linear scale may come near zero or cross it; use bc.ProjectedSGD or bc.ProximalSGD, or another map"
        return Condition(theorem, NAME, "fails", leaf.name, f"{why}; {now}")
    if isinstance(constraint, SoftClippedScale):
        return Condition(theorem, NAME, "holds", leaf.name, f"soft-clipped to at least {constraint.low:g}; {now}")
    bound = radius(optimiser)
    if bound is None:
        why = f"the map reaches every positive number; use scale_map=bc.SoftClip(low, high), or bc.TheoremAdam; {now}"
        return Condition(theorem, NAME, "fails", leaf.name, why)
    softplus = isinstance(constraint, type(constraints.softplus_positive))
    floor = math.log1p(math.exp(-bound)) if softplus else math.exp(-bound)
    why = f"with parameters in a ball of radius {bound:g} they are at least {floor:.3g}; {now}"
    return Condition(theorem, NAME, "holds", leaf.name, why)


def _of_networks(program: Program, modules: list[nn.Module], x: Tensor, theorem: str) -> Condition:
    noise, batch = program.example()
    with torch.no_grad():
        found = program.drawn(x, noise, batch)
    least = min((_least_scale(site["fn"]) for site in random_sites(found)), default=math.nan)
    now = "its scale is not to be read off" if math.isnan(least) else f"the smallest over a batch is {least:.3g} now"
    said = [constants(module) for module in modules]
    if all(c.bounded for c in said):
        why = f"a positive function of network outputs that lie in a closed interval; {now}"
        return Condition(theorem, NAME, "holds", "guide", why)
    if any(math.isnan(c.low) or math.isnan(c.high) for c in said):
        return Condition(theorem, NAME, "unknown", "guide", f"a network has no known range; {now}")
    why = f"the scale follows a network whose outputs are not bounded; end it with bc.SoftClipping(low, high); {now}"
    return Condition(theorem, NAME, "fails", "guide", why)


def _least_scale(distribution: Any) -> float:
    scale = getattr(innermost(distribution), "scale", None)
    return float(scale.abs().min()) if isinstance(scale, Tensor) else math.inf
