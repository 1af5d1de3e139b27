"""``Run``: moves a plain :class:`FitState` forward by chunks of steps, looks and checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bbvi_conv.binding import bind
from bbvi_conv.engine.choose import make_engine
from bbvi_conv.engine.engine import Carry, Engine, start_carry
from bbvi_conv.engine.streams import Stream
from bbvi_conv.families import MeanField
from bbvi_conv.monitor.judge import WIDE, Check, Judge, width
from bbvi_conv.monitor.state import MonitorState, Summary, look, summary, update
from bbvi_conv.monitor.strata import Strata
from bbvi_conv.objectives import ELBO, GrowingParticles, Objective
from bbvi_conv.optim import Adam, Constant, InverseSqrt, Optimiser, empty_average
from bbvi_conv.program.closed_form import closed_form_sites
from bbvi_conv.program.minibatch import Minibatch
from bbvi_conv.program.noise import BLOCK
from bbvi_conv.program.program import Program
from bbvi_conv.verdict import is_done

SPARSE = Strata(min_length=100, growth=0.25)
"""Strata of programs whose evaluations are wider than ``WIDE``, or run one by one."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides model and data; kept in ``config.json``.

    Attributes:
        family: makes the guide when none is given.
        objective: the bound; None: the ELBO by 10 draws a step, or by one draw where a plate is subsampled.
        optimiser: None: Adam with step size ``0.3 / sqrt(n)``, or ``1e-3`` where a plate is subsampled.
        minibatch: rows a step sees; None: all.
        max_steps: steps at most.
        tol: tolerance on the remaining gap, in total nats.
        seed: seed of every stream of noise.
        engine: ``"auto"``, ``"eager"`` or ``"traced"``.
        device: where it runs.
        dtype: float type, or None for the default by size.
        normalise: ``"datum"`` divides the loss by N when a plate is subsampled, ``"total"`` never does.
        average: ``"tail"`` returns the mean iterate of the last window, ``"all"`` that of the whole run
            (Polyak-Ruppert), ``"last"`` the last iterate.
        window: steps in the first window; later ones double.
        num_gradients: J, independent gradients at a look.
        strata: steps between looks; None: the default, or sparser where a look costs as much as J steps.
        khat_draws: draws for k-hat.
        update_modules: leave ``nn.Module`` parameters at the fitted values.
    """

    family: Any = field(default_factory=MeanField)
    objective: Objective | GrowingParticles | None = None
    optimiser: Optimiser | None = None
    minibatch: Minibatch | None = None
    max_steps: int = 20_000
    tol: float = 0.01
    seed: int = 0
    engine: str = "auto"
    device: str = "cpu"
    dtype: torch.dtype | None = None
    normalise: Literal["datum", "total"] = "datum"
    average: Literal["tail", "all", "last"] = "tail"
    window: int = 500
    num_gradients: int = 32
    strata: Strata | None = None
    khat_draws: int = 2000
    update_modules: bool = True

    def bound(self) -> Objective | GrowingParticles:
        """The objective, chosen where none was given."""
        return self.objective or ELBO(num_particles=1 if self.minibatch else 10)

    def rule(self) -> Optimiser:
        """The optimiser, chosen where none was given."""
        return self.optimiser or Adam(Constant(1e-3) if self.minibatch else InverseSqrt(0.3))

    def __post_init__(self) -> None:
        for name in ("max_steps", "window", "khat_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_gradients < 4:
            raise ValueError(f"num_gradients must be at least 4 to tell signal from noise, got {self.num_gradients}")
        if not self.tol > 0:
            raise ValueError(f"tol must be positive (nats), got {self.tol}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        for name, choices in (("normalise", ("datum", "total")), ("average", ("tail", "all", "last"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(choices)}")


class FitState(NamedTuple):
    """Everything a run is between two looks: plain data, enough to go on from.

    Attributes:
        carry: iterate, optimiser state, average of the current window, step.
        window_start: step at which the current window began.
        previous: returned parameters of the last finished window; None in the first.
        monitor: looks so far.
        checks: checks so far.
        losses: ``(first step, steps, mean loss)`` of each chunk; per datum when a plate is subsampled.
        seconds: time spent on steps, monitor, compile and export.
        done: whether the stopping rule has fired.
    """

    carry: Carry
    window_start: int = 0
    previous: Tensor | None = None
    monitor: MonitorState = MonitorState()
    checks: tuple[Check, ...] = ()
    losses: tuple[tuple[int, int, float], ...] = ()
    seconds: Mapping[str, float] = {}
    done: bool = False

    @property
    def step(self) -> int:
        """Optimiser steps made."""
        return int(self.carry.step)


class OnLook(Protocol):
    """Called after every look and check with the state so far."""

    def __call__(self, state: FitState) -> None: ...


def returned(state: FitState, settings: Settings) -> Tensor:
    """The parameters a run returns; a tail mean is that of the window before while the last one is short."""
    carry = state.carry
    if settings.average == "last" or int(carry.bad) >= 0:
        return carry.x
    count = int(carry.average.steps)
    if settings.average == "tail" and state.previous is not None and 4 * count < state.window_start:
        return state.previous
    return carry.average.mean if count else carry.x


def figures(state: FitState) -> Summary:
    """Gradient norms and rates of the run so far, over the iterates 0 .. n."""
    return summary(state.monitor, steps=state.step + 1 if state.monitor.looks else None)


class _Stage(NamedTuple):
    """What runs one objective."""

    engine: Engine
    judge: Judge
    stream: Stream


class Run:
    """A program under its settings: moves a :class:`FitState` forward. One look per stratum, one check per window."""

    def __init__(
        self,
        program: Program,
        settings: Settings,
        held_out: Program | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.program, self.settings, self.clock = program, settings, clock
        start = clock()
        self.normaliser = float(program.total) if program.minibatch and settings.normalise == "datum" else 1.0
        self.schedule, self.held_out = settings.bound(), held_out
        if self.schedule.at(0, ()).analytic_kl:
            program.analytic = closed_form_sites(program)
        self._stages: dict[Objective, _Stage] = {}
        self._enter(self.schedule.at(0, ()))
        dear = width(self.engine.calculus) > WIDE or not self.engine.calculus.vectorise
        self.strata = settings.strata or (SPARSE if dear else Strata())
        self.compile_seconds = clock() - start

    def _enter(self, objective: Objective) -> None:
        """Make ``objective`` the one in force: engine, judge and noise of its own, kept for when it comes back."""
        if objective not in self._stages:
            settings = self.settings
            rule = bind(settings.rule(), self.program, objective, self.normaliser)
            engine = make_engine(settings.engine, self.program, objective, rule, normaliser=self.normaliser)
            judge = Judge(
                engine.calculus,
                settings.seed,
                gradients=settings.num_gradients,
                tolerance=settings.tol,
                held_out=self.held_out,
            )
            stream = Stream(self.program, settings.seed, "optimise", objective.draws)
            self._stages[objective] = _Stage(engine, judge, stream)
        self.objective = objective
        self.engine, self.judge, self.stream = self._stages[objective]

    def start(self, x: Tensor) -> FitState:
        """The state before the first step."""
        return FitState(start_carry(self.settings.rule(), x), seconds={"compile": self.compile_seconds})

    def advance(self, state: FitState, max_steps: int, on_event: Callable[[FitState, bool], None]) -> FitState:
        """Go on until done, not finite, or ``max_steps``; ``on_event(state, looked)`` after every chunk.

        A check that :meth:`finish` made inside a window is dropped, so that a resumed run decides as one never stopped.
        """
        if not state.done and state.step < max_steps:
            state = state._replace(checks=tuple(c for c in state.checks if c.step <= state.window_start))
        while not state.done and int(state.carry.bad) < 0:
            step = state.step
            index = len(state.monitor.looks)
            look_at = self.strata.random_step(self.settings.seed, index)
            self._enter(self.schedule.at(step, state.monitor.looks))
            if step == look_at and step < max_steps:
                state = self._look(state, index)
                on_event(state, True)
                continue
            if step >= max_steps:
                break
            window_end = self._window_end(state)
            block_end = (step // BLOCK + 1) * BLOCK
            change = self.schedule.next_change(step) or block_end
            state = self._chunk(state, min(look_at, window_end, max_steps, block_end, change) - step)
            looked = state.step == window_end and int(state.carry.bad) < 0
            if looked:
                state = self._close_window(state)
            on_event(state, looked)
        return state

    def finish(self, state: FitState) -> FitState:
        """A check of the returned parameters, if the last one was of others."""
        made = state.checks[-1].step if state.checks else -1
        if int(state.carry.bad) >= 0 or state.step == 0 or made == state.step:
            return state
        x = returned(state, self.settings)
        if x is state.previous and made >= state.window_start:
            return state
        return self._check(state, x)

    def _window_end(self, state: FitState) -> int:
        return 2 * state.window_start if state.window_start else self.settings.window

    def _timed(self, state: FitState, name: str, start: float) -> dict[str, float]:
        seconds = dict(state.seconds)
        seconds[name] = seconds.get(name, 0.0) + self.clock() - start
        return seconds

    def _chunk(self, state: FitState, count: int) -> FitState:
        start, step = self.clock(), state.step
        carry, losses = self.engine.advance(state.carry, self.stream, step, count)
        made = int(carry.step) - step
        record = ((step, made, float(losses[:made].mean())),) if made else ()
        return state._replace(carry=carry, losses=(*state.losses, *record), seconds=self._timed(state, "steps", start))

    def _look(self, state: FitState, index: int) -> FitState:
        start = self.clock()
        grams, losses = self.judge.grams(state.carry.x, index, state.step)
        if not all(bool(gram.isfinite().all()) for gram in grams.values()):
            frozen = state.carry._replace(bad=state.carry.step.clone())
            return state._replace(carry=frozen, seconds=self._timed(state, "monitor", start))
        entry = look(
            state.step,
            index,
            self.strata.bounds(index),
            grams,
            bound=-float(losses.mean()),
            bound_error=float(losses.std()) / len(losses) ** 0.5,
            noise=self.judge.noise(state.carry.x, index, state.step),
        )
        return state._replace(monitor=update(state.monitor, entry), seconds=self._timed(state, "monitor", start))

    def _check(self, state: FitState, x: Tensor) -> FitState:
        start = self.clock()
        check = self.judge.check(state.step, x, state.previous)
        return state._replace(checks=(*state.checks, check), seconds=self._timed(state, "monitor", start))

    def _close_window(self, state: FitState) -> FitState:
        x = returned(state._replace(previous=None), self.settings)
        state = self._check(state, x)
        settled = self.schedule.settled(state.step, state.monitor.looks)
        if settled and is_done(state.checks, self.trend(state)[0], self.settings.tol):
            return state._replace(done=True)
        return self.next_window(state, x)

    def next_window(self, state: FitState, x: Tensor) -> FitState:
        """Begin a window; ``x`` is what the last one returned."""
        carry = state.carry
        if self.settings.average != "all":
            carry = carry._replace(average=empty_average(carry.x))
        return state._replace(carry=carry, previous=x.clone(), window_start=state.step, done=False)

    def trend(self, state: FitState) -> tuple[Any, str]:
        """Trend of the squared gradient norm, and its sentence."""
        plateau = figures(state).rate.plateau
        return plateau.trend, plateau.reason

    def failure(self, state: FitState) -> str:
        """Which site at which step was not finite first; empty while all is well."""
        bad = int(state.carry.bad)
        if bad < 0:
            return ""
        self._enter(self.schedule.at(state.step, state.monitor.looks))
        feed = next(self.stream.steps(bad, 1))
        where = self.program.first_bad_site(state.carry.x, feed.noise.at(0), feed.batch(self.program, 0))
        return f"step {bad}: {where}"
