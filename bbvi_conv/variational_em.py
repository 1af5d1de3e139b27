r"""Variational EM: factors of single data fitted until they converge, and the model's parameters between.

    E-step:  q_n* = the mean-field Gaussian of datum n with the highest bound at theta, for every n,
    M-step:  theta follows the gradient of the bound at these factors.

Without an encoder nothing is lost to amortization: the E-step alone, at a fitted theta, says how much an encoder loses.
Source: Cremer, Li and Duvenaud (2018), https://arxiv.org/abs/1801.03558; Hoffman et al. (2013), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from bbvi_conv.engine.choose import make_engine
from bbvi_conv.engine.engine import Engine, start_carry
from bbvi_conv.engine.streams import Feed, Stream
from bbvi_conv.families.mean_field import MeanField, ScoreMeanField
from bbvi_conv.fitting import Fit
from bbvi_conv.objectives import ELBO
from bbvi_conv.objectives.checks import check_count
from bbvi_conv.optim import Adam, InverseSqrt, Optimiser, Within, empty_average
from bbvi_conv.program.build import build, positional
from bbvi_conv.program.device import cpu_by_default
from bbvi_conv.program.program import Program


class Factors(NamedTuple):
    """What an E-step, or a whole run, ends with.

    Attributes:
        program: the model with a factor per datum, over the data given.
        x: its parameters ``(P,)``: theta, then locations and scales of the factors.
        steps: steps made, of both kinds.
        converged: whether every E-step stopped by its rule rather than by ``max_steps``.
        history: ``(step, bound per datum)`` at the end of each window, on the same noise.
    """

    program: Program
    x: Tensor
    steps: int
    converged: bool
    history: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class VariationalEM:
    """Per-datum mean-field factors on the unconstrained space, by Adam with step sizes C / sqrt(n).

    Args:
        gradient: ``"pathwise"``, or ``"score-function"`` with a leave-one-out baseline.
        until: an E-step ends when a window raises the ``"elbo"``, on common noise, by less than ``tol`` nats per datum,
            or when the average ``"parameters"`` of two windows differ by less than ``tol`` in root mean square.
        tol: see ``until``.
        num_particles: draws a step.
        step_size: C.
        window: steps between two looks at the rule.
        max_steps: steps of one E-step at most.
        m_steps: steps of one M-step.
        init_scale: standard deviation of a factor at the start.
        family: another family in the place of mean-field factors, for a single datum at a time unless it keeps plates.
        seed: of the noise.
        engine: as for :func:`bbvi_conv.fit`.

    Raises:
        ValueError: an unknown option, or a number that is not positive.
    """

    gradient: Literal["pathwise", "score-function"] = "pathwise"
    until: Literal["elbo", "parameters"] = "elbo"
    tol: float = 1e-3
    num_particles: int = 8
    step_size: float = 0.1
    window: int = 200
    max_steps: int = 5000
    m_steps: int = 50
    init_scale: float = 0.5
    seed: int = 0
    engine: str = "auto"
    family: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None

    def __post_init__(self) -> None:
        for name, choices in (("gradient", ("pathwise", "score-function")), ("until", ("elbo", "parameters"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("num_particles", "window", "max_steps", "m_steps"):
            check_count(name, getattr(self, name))
        if not self.tol > 0:
            raise ValueError(f"tol must be positive, got {self.tol}")
        if self.gradient == "score-function" and self.family is not None:
            raise ValueError("the score function goes with mean-field factors: leave family out")
        if self.gradient == "score-function" and self.num_particles < 2:
            raise ValueError("the score function needs num_particles of at least 2 for its baseline")

    @cpu_by_default
    def e_step(
        self,
        source: Fit | Callable[..., Any],
        args: tuple[Any, ...] | Tensor,
        *,
        draws: Mapping[str, Tensor] | None = None,
    ) -> Factors:
        """The best factors of these data at the parameters of a fit, or at those a model starts with.

        Args:
            source: a fit with an encoder, whose theta is taken, or a model.
            args: positional arguments of the model over the data.
            draws: of the latent sites for these data, ``(S, ...)``, at whose locations and scales the factors start.

        Raises:
            ValueError: as for :func:`bbvi_conv.fit`.
        """
        program, x = self._program(source, args)
        if draws is not None and hasattr(program.guide, "placed"):
            x = program.replaced(x, program.guide.placed(draws), constrained=True)
        return self._e_step(_Half(self, program, "phi"), x, 0)

    @cpu_by_default
    def fit(self, source: Fit | Callable[..., Any], args: tuple[Any, ...] | Tensor, rounds: int = 20) -> Factors:
        """E-steps and M-steps by turns, ``rounds`` of them, and an E-step at the end.

        Raises:
            ValueError: as for :func:`bbvi_conv.fit`; or a model without parameters.
        """
        check_count("rounds", rounds)
        program, x = self._program(source, args)
        expect, maximise = _Half(self, program, "phi"), _Half(self, program, "theta")
        found = self._e_step(expect, x, 0)
        for _ in range(rounds):
            moved = maximise.window(found.x, None, found.steps, 0, self.m_steps)[0]
            following = self._e_step(expect, moved, found.steps + self.m_steps)
            history, converged = found.history + following.history, found.converged and following.converged
            found = following._replace(history=history, converged=converged)
        return found

    def _program(self, source: Fit | Callable[..., Any], args: tuple[Any, ...] | Tensor) -> tuple[Program, Tensor]:
        args = positional(args)
        factors = MeanField(self.init_scale) if self.gradient == "pathwise" else ScoreMeanField(self.init_scale)
        family = self.family or factors
        fitted = source if isinstance(source, Fit) else None
        model: Any = source.program.model if isinstance(source, Fit) else source
        dtype, device = (None, None) if fitted is None else (fitted.program.dtype, fitted.program.device)
        program = build(model, family=family, args=args, dtype=dtype, device=device, seed=self.seed)
        x = program.initial()
        if fitted is not None:
            known = {name: value for group in fitted.params.values() for name, value in group.items()}
            x = program.replaced(x, known)
        return program, x

    def _e_step(self, half: _Half, x: Tensor, before: int) -> Factors:
        history: list[tuple[int, float]] = []
        previous, bound, steps, done = x, -math.inf, 0, False
        state: tuple[Tensor, ...] | None = None
        while steps < self.max_steps and not done:
            count = min(self.window, self.max_steps - steps)
            x, mean, state = half.window(x, state, before + steps, steps, count)
            steps += count
            after = half.bound(mean)
            history.append((before + steps, after))
            if self.until == "elbo":
                done = after - bound < self.tol
            else:
                done = float((mean - previous)[half.part].square().mean().sqrt()) < self.tol
            previous, bound = mean, after
        return Factors(half.program, previous, before + steps, done, tuple(history))


class _Half:
    """Steps on theta or on phi alone, and the bound on noise of its own."""

    def __init__(self, em: VariationalEM, program: Program, group: str) -> None:
        self.program, self.part = program, program.groups[group]
        if self.part.start == self.part.stop:
            raise ValueError(f"the model has no parameters to {'maximise' if group == 'theta' else 'expect'} over")
        objective = ELBO(em.num_particles)
        self.rows = float(math.prod(program.structure.unit_shape) or 1)
        self.rule: Optimiser = Within(Adam(InverseSqrt(em.step_size)), self.part.start, self.part.stop)
        made = make_engine(em.engine, program, objective, self.rule, normaliser=self.rows, steps=em.max_steps)
        self.engine: Engine = made
        self.stream = Stream(program, em.seed, f"em {group}", objective.draws)
        self.same: Feed = Stream(program, em.seed, "em bound", objective.draws).once(0, 16)

    def window(
        self, x: Tensor, state: tuple[Tensor, ...] | None, at: int, made: int, count: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Iterate, mean iterate and optimiser state after ``count`` more steps; ``made`` lie behind, or a new start."""
        carry = start_carry(self.rule, x)
        if state is not None:
            carry = carry._replace(state=state, step=carry.step + made, average=empty_average(x))
        carry, _ = self.engine.advance(carry, self.stream, at, count)
        if int(carry.bad) >= 0:
            raise ValueError(f"step {int(carry.bad)} met a value that is not finite; lower step_size")
        return carry.x, carry.average.mean, carry.state

    def bound(self, x: Tensor) -> float:
        """Nats per datum, always on the same noise."""
        return -float(self.engine.calculus.losses(x, self.same).mean())
