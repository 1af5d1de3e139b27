"""Check what the convergence theorems ask, condition by condition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bbvi_conv.binding import bind
from bbvi_conv.families import FullRank, Linear, MeanField
from bbvi_conv.objectives import ELBO, Objective
from bbvi_conv.optim import Adam, Constant, Optimiser
from bbvi_conv.program.build import build, positional
from bbvi_conv.program.device import cpu_by_default
from bbvi_conv.program.minibatch import Minibatch
from bbvi_conv.program.noise import generator
from bbvi_conv.program.program import Program
from bbvi_conv.theory import modules, spread, steps
from bbvi_conv.theory.condition import Assumptions, Condition, Status, Term
from bbvi_conv.theory.log_concave import probe, unknown_form
from bbvi_conv.theory.target import Target

if TYPE_CHECKING:
    from bbvi_conv.fitting import Fit

NORM = "gradient norm of SGD and Adam (Surendran et al. 2025)"
CONVEX = "location-scale BBVI (Domke et al. 2023; Kim et al. 2023, 2024)"
SPREADS = (1.0, 3.0, 8.0)
"""Curvature is looked at where q's draws are, and so many times further out."""


class Subject(NamedTuple):
    """What is checked, and at which parameters."""

    program: Program
    objective: Objective
    optimiser: Optimiser
    normaliser: float
    x: Tensor
    log_concave: bool | None = None
    initial_gap: float | None = None


@cpu_by_default
def assumptions(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    optimiser: Optimiser,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: dict[str, Any] | None = None,
    *,
    objective: Objective | None = None,
    minibatch: Minibatch | None = None,
    log_concave: bool | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Assumptions:
    r"""What the convergence theorems ask of a model, guide and optimiser: holds, fails or unknown, where and why.

    Two sets of conditions. *Gradient norm*: :math:`E\|\nabla L(x_R)\|^2 = O(\log n / \sqrt n)` under SGD and Adam with
    :math:`\gamma_n = C n^{-1/2}`, :math:`\beta_1 < \sqrt{\beta_2} < 1`, parameters in a ball, networks smooth with
    bounded outputs, scales bounded away from zero. *Location-scale*, where the guide has no networks: rates for
    objective gap and distance, for log-concave targets under linear parameterisations with a projection or proximal
    steps.

    "Holds" is never said on the word of a sample: networks and scales by their construction, log-concavity by known
    forms of all sites. Log-concavity fails where a Hessian at a draw of the guide, or further out, has a positive
    eigenvalue, and is otherwise unknown, claimed or not.

    Args:
        model: a Pyro model, called as ``model(*args, **kwargs)``.
        guide: a Pyro guide, or a family such as ``bc.FullRank()``.
        optimiser: the optimiser.
        args, kwargs, minibatch, dtype, seed: as for :func:`bbvi_conv.fit`.
        objective: the bound; None: the ELBO.
        log_concave: the user's claim, for the record; False: not to be looked at.

    Returns:
        Conditions, and terms of the rate at the start. ``Fit.assumptions()`` gives them at the end of a fit.

    Raises:
        ValueError: bad input, as for :func:`bbvi_conv.fit`.
    """
    family: Any = guide if is_dataclass(guide) and not isinstance(guide, nn.Module) else None
    args = positional(args)
    program = build(
        model,
        None if family is not None else guide,
        args,
        kwargs,
        family=family,
        minibatch=minibatch,
        dtype=dtype,
        seed=seed,
    )
    bound = objective or ELBO()
    normaliser = float(program.total) if minibatch else 1.0
    return check(Subject(program, bound, optimiser, normaliser, program.initial(), log_concave))


def of_fit(fit: Fit, log_concave: bool | None = None) -> Assumptions:
    """The same for a fit, at the parameters it returned."""
    looks, checks = fit.state.monitor.looks, fit.state.checks
    gap = None
    if looks and looks[0].bound is not None and checks and checks[-1].bound.value is not None:
        gap = checks[-1].bound.value / fit.run.normaliser - looks[0].bound
    return check(Subject(fit.program, fit.objective, fit.run.rule, fit.run.normaliser, fit.x, log_concave, gap))


def check(subject: Subject) -> Assumptions:
    """Every condition that applies, and the terms of the rate."""
    conditions = [*_of_norm(subject)]
    if _is_location_scale(subject.program):
        conditions += _of_location_scale(subject)
    return Assumptions(tuple(conditions), _terms(subject))


def _of_norm(subject: Subject) -> Iterator[Condition]:
    yield from steps.conditions(subject.optimiser, subject.x, NORM)
    yield from modules.conditions(subject.program, NORM)
    yield from spread.conditions(subject.program, subject.optimiser, subject.x, NORM)


def _is_location_scale(program: Program) -> bool:
    """Whether the guide has no networks and its latents are global."""
    guided = any(network.side == "guide" for network in modules.networks(program))
    local = any(plate == program.plate for site in program.structure.latents for plate, _, _ in site.plates)
    return not (guided or local or program.by_index)


def _of_location_scale(subject: Subject) -> Iterator[Condition]:
    program = subject.program
    family: Any = getattr(program.guide, "family", None)
    if isinstance(family, MeanField | FullRank):
        yield Condition(CONVEX, "location-scale family", "holds", "guide", f"z = m + C eps by {family}")
        linear = isinstance(family.scale_map, Linear) and not getattr(family, "relative", None)
        why = (
            "the entries of C are the parameters: the objective is convex where log p is concave"
            if linear
            else "C is a nonlinear function of the parameters, which costs convexity: the guarantee is then on the "
            "gradient norm; scale_map=bc.Linear() keeps it"
        )
        yield Condition(CONVEX, "linear parameterisation", "holds" if linear else "fails", "guide", why)
    else:
        why = "neither MeanField nor FullRank, the families that the theorems are about"
        yield Condition(CONVEX, "location-scale family", "unknown", "guide", why)
    try:
        bind(subject.optimiser, program, subject.objective, subject.normaliser)
        bound, taker = type(subject.objective).__name__, type(subject.optimiser).__name__
        why = f"{taker} takes the {subject.objective.estimator} gradient of the {bound}"
        yield Condition(CONVEX, "estimator goes with the optimiser", "holds", "objective, optimiser", why)
    except ValueError as error:
        yield Condition(CONVEX, "estimator goes with the optimiser", "fails", "objective, optimiser", str(error))
    yield from _of_target(subject)


def _of_target(subject: Subject) -> Iterator[Condition]:
    name = "log-concave target"
    if subject.log_concave is False:
        yield Condition(CONVEX, name, "fails", "model", "said not to be")
        return
    try:
        target = Target(subject.program, subject.x)
        form = unknown_form(target)
        found = probe(target, _points(subject, target))
    except Exception as error:  # the user's model runs here, at values of our choice
        reason = " ".join(str(error).split())[:200]
        yield Condition(CONVEX, name, "unknown", "model", f"its log density cannot be differentiated twice: {reason}")
        return
    claimed = "claimed, and " if subject.log_concave else ""
    if found.witness:
        yield Condition(CONVEX, name, "fails", "model", found.witness)
    elif not form:
        yield Condition(CONVEX, name, "holds", "model", "every site is of a form that is log-concave in all latents")
    else:
        why = f"{form}; {claimed}not contradicted by the curvature at {found.points} points"
        yield Condition(CONVEX, name, "unknown", "model", why)
    within: Any = steps.inner(subject.optimiser)
    rule = getattr(within, "step_size", None)
    if found.smallest < 0 and isinstance(rule, Constant) and not isinstance(within, Adam):
        size, smoothness = rule.size / subject.normaliser, -found.smallest
        status: Status = "fails" if size * smoothness > 1 else "unknown"
        why = f"the step is {size:.3g}, and -log p curves by up to {smoothness:.3g} at {found.points} points"
        yield Condition(CONVEX, "step size at most 1 / L", status, "step_size", why)


def _points(subject: Subject, target: Target) -> list[Tensor]:
    """Draws of the guide on the unconstrained space, and the same further from their mean."""
    program = subject.program
    count = max(4, min(24, 600 // max(target.dim, 1)) // len(SPREADS))
    noise = program.layout.draw(generator(0, "evaluate", 0, program.device), count, dtype=program.dtype)
    _, batch = program.example()
    with torch.no_grad():
        values = [program.site_values(subject.x, noise.at(i), batch).latent for i in range(count)]
        drawn = torch.stack([target.pack(value) for value in values])
    middle = drawn.mean(0)
    return [zeta for k in SPREADS for zeta in middle + k * (drawn - middle)]


def _terms(subject: Subject) -> tuple[Term, ...]:
    program, x = subject.program, subject.x
    count, size = modules.layers(program), len(x)
    radius = steps.radius(subject.optimiser)
    a = float(x.norm()) if radius is None else radius
    within = steps.inner(subject.optimiser)
    beta1 = within.beta1 if isinstance(within, Adam) else 0.0
    power = count * a ** (2 * (count - 1)) if (count - 1) * math.log10(max(a, 1e-300)) < 150 else math.inf
    rows = program.minibatch.size if program.minibatch else 1
    draws = subject.objective.draws
    return (
        Term("L*", subject.initial_gap, "bound at the end less that at the start, per unit of the loss; over sqrt(n)"),
        Term("N", float(count), "linear and convolutional layers of all networks"),
        Term("a", a, "radius of the ball" if radius is not None else "norm of the parameters"),
        Term("d*", float(size), "parameters"),
        Term(
            "N a^(2(N-1)) d* / (1 - beta1)",
            power * size / (1 - beta1),
            f"with beta1 = {beta1:g}; times log n / sqrt(n)",
        ),
        Term("1 / (B K)", 1 / (rows * draws), f"noise of a gradient: B = {rows} rows, K = {draws} draws"),
    )
