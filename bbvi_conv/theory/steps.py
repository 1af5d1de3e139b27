"""What theorems ask of an optimiser: step sizes, moments, a bounded set of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bbvi_conv.optim import (
    Adam,
    Ball,
    Constant,
    CosineDecay,
    ExponentialDecay,
    InverseLinear,
    InverseSqrt,
    Optimiser,
    Projected,
)
from bbvi_conv.theory.condition import Condition, Status


def inner(optimiser: Optimiser) -> Any:
    """The optimiser that makes the step."""
    return inner(optimiser.optimiser) if isinstance(optimiser, Projected) else optimiser


def radius(optimiser: Optimiser) -> float | None:
    """Radius of the ball that the parameters are kept in, if any."""
    if not isinstance(optimiser, Projected):
        return None
    return optimiser.onto.radius if isinstance(optimiser.onto, Ball) else radius(optimiser.optimiser)


def conditions(optimiser: Optimiser, x: Tensor, theorem: str) -> Iterator[Condition]:
    """Step-size rule, moments of Adam, the ball."""
    within = inner(optimiser)
    status, why = _step_size(getattr(within, "step_size", None))
    yield Condition(theorem, "step size C / sqrt(n)", status, "step_size", why)
    if isinstance(within, Adam):
        root = math.sqrt(within.beta2)
        fine = within.beta1 < root
        yield Condition(
            theorem,
            "beta1 < sqrt(beta2) < 1",
            "holds" if fine else "fails",
            "beta1, beta2",
            f"beta1 = {within.beta1:g}, sqrt(beta2) = {root:.6g}" + ("" if fine else "; lower beta1 or raise beta2"),
        )
    norm, bound = float(x.norm()), radius(optimiser)
    if bound is not None:
        why = f"projected onto the ball of radius {bound:g}; their norm is {norm:.3g}"
        yield Condition(theorem, "parameters in a ball", "holds", "optimiser", why)
    else:
        why = f"nothing keeps them bounded; their norm is {norm:.3g}: bc.TheoremAdam or bc.Projected with bc.Ball does"
        yield Condition(theorem, "parameters in a ball", "unknown", "optimiser", why)


def _step_size(rule: Any) -> tuple[Status, str]:
    if isinstance(rule, InverseSqrt):
        return "holds", f"{rule.size:g} / sqrt(n)"
    if isinstance(rule, InverseLinear):
        return (
            "unknown",
            f"{rule.size:g} / (n + {rule.delay:g}): for strongly convex objectives; else use bc.InverseSqrt",
        )
    if isinstance(rule, Constant):
        return "fails", f"constant {rule.size:g}: the gradient norm stalls at a floor set by it; use bc.InverseSqrt"
    if isinstance(rule, ExponentialDecay):
        return (
            "fails",
            "steps that decay exponentially have a finite sum, so a run may stop short; use bc.InverseSqrt",
        )
    if isinstance(rule, CosineDecay):
        end = "ends at a constant" if rule.final else "ends at zero"
        return "fails", f"a cosine decay {end} after {rule.steps:,} steps; use bc.InverseSqrt"
    return "unknown", "a rule of your own" if rule is not None else "the optimiser has no step_size"
