"""``Run``: moves a plain :class:`FitState` forward by chunks of steps, looks and checks."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bbvi_conv.binding import bind
from bbvi_conv.engine.choose import make_engine
from bbvi_conv.engine.engine import Carry, Engine, start_carry
from bbvi_conv.engine.streams import Stream
from bbvi_conv.engine.workers import one_thread_in_forks
from bbvi_conv.families import MeanField
from bbvi_conv.monitor.gradient_norm import usable
from bbvi_conv.monitor.judge import WIDE, Check, Judge, width
from bbvi_conv.monitor.seeds import over_seeds
from bbvi_conv.monitor.state import Look, MonitorState, Summary, look, series, update
from bbvi_conv.monitor.strata import Strata
from bbvi_conv.monitor.trend import Plateau, plateau
from bbvi_conv.objectives import ELBO, GrowingParticles, Objective
from bbvi_conv.objectives.objective import checked_objective, shown
from bbvi_conv.optim import Adam, Constant, InverseSqrt, Optimiser, empty_average
from bbvi_conv.program.buffers import of_modules, restore_buffers
from bbvi_conv.program.closed_form import closed_form_sites
from bbvi_conv.program.minibatch import Minibatch
from bbvi_conv.program.noise import BLOCK
from bbvi_conv.program.program import Program
from bbvi_conv.program.trace import TracedLogWeights
from bbvi_conv.verdict import is_better, is_cut_off, is_done, is_over, is_worse

SPARSE = Strata(min_length=100, growth=0.25)
"""Strata of programs whose evaluations are wider than ``WIDE``, or run one by one."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides model and data; kept in ``config.json``.

    Attributes:
        family: makes the guide when none is given.
        objective: the bound; None: the ELBO by 10 draws a step, or by one draw where a plate is subsampled.
        optimiser: None: Adam with step size ``0.3 / sqrt(n)``; for flows and networks ``0.1 / sqrt(n)`` and no gradient
            longer than 10; ``1e-3`` where a plate is subsampled.
        minibatch: rows a step sees; None: all.
        max_steps: steps at most.
        tol: tolerance on the remaining gap, in total nats.
        seed: seed of every stream of noise.
        num_seeds: S, independent runs at once, of the seeds ``seed .. seed + S - 1``.
        engine: ``"auto"``, ``"eager"``, ``"traced"``, ``"compiled"`` or ``"cuda-graph"``.
        device: where it runs; :func:`bbvi_conv.fit` chooses, where it is not told.
        dtype: float type, or None for the default by size.
        amp: ``"bfloat16"``: matrix products and convolutions of a step take and give rounded numbers, for processors
            with units for them; ``"tf32"``: on CUDA they take numbers of 11 bits or more. All else stays as it is:
            parameters, densities, looks and checks.
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
    num_seeds: int = 1
    engine: str = "auto"
    device: str = "cpu"
    dtype: torch.dtype | None = None
    amp: Literal["bfloat16", "tf32"] | None = None
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

    def rule(self, layered: bool = False) -> Optimiser:
        """The optimiser, chosen where none was given; ``layered``: :attr:`Program.layered` of what is fitted."""
        if self.optimiser is not None:
            return self.optimiser
        if self.minibatch:
            return Adam(Constant(1e-3))
        if layered or getattr(self.family, "layered", False):
            return Adam(InverseSqrt(0.1), max_norm=10.0)
        return Adam(InverseSqrt(0.3))

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", str(self.device))
        self._check_kinds()
        for name in ("max_steps", "window", "khat_draws", "num_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_gradients < 4:
            raise ValueError(f"num_gradients must be at least 4 to tell signal from noise, got {self.num_gradients}")
        if not self.tol > 0:
            raise ValueError(f"tol must be positive (nats), got {self.tol}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        for name, choices in (
            ("dtype", (None, torch.float32, torch.float64)),
            ("normalise", ("datum", "total")),
            ("average", ("tail", "all", "last")),
            ("amp", (None, "bfloat16", "tf32")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(map(str, choices))}"
                )

    def _check_kinds(self) -> None:
        """Refuse what is no value of its field's kind, before anything is computed."""
        for name in ("max_steps", "window", "num_gradients", "khat_draws", "num_seeds", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name} must be a whole number, got {shown(value)}")
        if isinstance(self.tol, bool) or not isinstance(self.tol, Real):
            raise ValueError(f"tol must be a number of nats, got {shown(self.tol)}")
        if self.objective is not None and not isinstance(self.objective, GrowingParticles):
            checked_objective(self.objective)
        own_class = isinstance(self.family, type) and self.family.__module__.startswith("bbvi_conv.")
        updates = callable(getattr(self.optimiser, "update", None)) and callable(getattr(self.optimiser, "init", None))
        for name, fits, example in (
            ("family", callable(self.family) and not own_class, "such as bc.FullRank(), or an AutoGuide's class"),
            ("optimiser", updates and not isinstance(self.optimiser, type), "such as bc.Adam(bc.InverseSqrt(0.1))"),
            ("minibatch", isinstance(self.minibatch, Minibatch), 'such as bc.Minibatch(128, plate="data")'),
            ("strata", isinstance(self.strata, Strata), "such as Strata(min_length=20)"),
        ):
            value = getattr(self, name)
            if value is not None and not fits:
                raise ValueError(f"{name} must be a value {example}, got {shown(value)}")


class FitState(NamedTuple):
    """Everything a run is between two looks: plain data, enough to go on from.

    With several seeds it is the state of the first, which holds those of the others; :attr:`seeds` lists them all.

    Attributes:
        carry: iterate, optimiser state, average of the current window, step.
        window_start: step at which the current window began.
        previous: returned parameters of the last finished window; None in the first.
        monitor: looks so far.
        checks: checks so far.
        losses: ``(first step, steps, mean loss)`` of each chunk; per datum when a plate is subsampled.
        seconds: time spent on steps, monitor, compile and export; by all seeds together, kept by the first.
        done: whether the stopping rule has fired for this seed.
        best: returned parameters of the window that held-out rows like best, where there are such rows; of two windows
            that they do not tell apart the first.
        best_step: step at which that window ended.
        buffers: of the networks, where steps change them, as running averages; kept by the first seed.
        others: the states of the seeds after the first.
    """

    carry: Carry
    window_start: int = 0
    previous: Tensor | None = None
    monitor: MonitorState = MonitorState()
    checks: tuple[Check, ...] = ()
    losses: tuple[tuple[int, int, float], ...] = ()
    seconds: Mapping[str, float] = {}
    done: bool = False
    best: Tensor | None = None
    best_step: int = 0
    buffers: Mapping[str, Tensor] = {}
    others: tuple[FitState, ...] = ()

    @property
    def step(self) -> int:
        """Optimiser steps made, by the seed that made most."""
        return max(int(one.carry.step) for one in (self, *self.others))

    @property
    def seeds(self) -> tuple[FitState, ...]:
        """The state of every seed."""
        return (self._replace(others=()), *self.others)

    @property
    def frozen(self) -> bool:
        """Whether this seed met a value that was not finite, and goes no further."""
        return int(self.carry.bad) >= 0

    @property
    def ended(self) -> bool:
        """Whether this seed is done or frozen."""
        return self.done or self.frozen


def joined(states: Sequence[FitState]) -> FitState:
    """The state of a run from those of its seeds: the inverse of ``state.seeds``."""
    return states[0]._replace(others=tuple(states[1:]))


class OnLook(Protocol):
    """Called after every look and check with the state so far."""

    def __call__(self, state: FitState) -> None: ...


def returned(state: FitState, settings: Settings) -> Tensor:
    """The parameters one seed returns: the newest, or those of the best window where held-out rows prefer them."""
    return state.best if prefers_best(state, settings.tol) and state.best is not None else newest(state, settings)


def prefers_best(state: FitState, tolerance: float) -> bool:
    """Whether at the last check held-out rows had a significantly lower bound than in the best window."""
    return bool(state.checks) and not state.frozen and is_worse(state.checks[-1].over_best, tolerance)


def newest(state: FitState, settings: Settings) -> Tensor:
    """What the last window came to; a tail mean is that of the window before while the last one is short."""
    carry = state.carry
    if settings.average == "last" or state.frozen:
        return carry.x
    count = int(carry.average.steps)
    if settings.average == "tail" and state.previous is not None and 4 * count < state.window_start:
        return state.previous
    return carry.average.mean if count else carry.x


def figures(state: FitState) -> Summary:
    """Gradient norms and rates of the run so far, over the iterates 0 .. n.

    With several seeds over all that are not frozen, and n is the step that all of them reached.
    """
    whole = [one for one in state.seeds if not one.frozen] or state.seeds
    return over_seeds([one.monitor for one in whole], steps=min(one.step for one in whole) + 1)


class _Stage(NamedTuple):
    """What runs one objective."""

    engine: Engine
    judge: Judge
    stream: Stream


class Run:
    """A program under its settings: moves a :class:`FitState` forward. One look per stratum, one check per window.

    Several seeds go side by side. Each is the run that it would be alone, with its own start, noise, checks and end;
    only the steps looked at are those drawn for the first seed, so that one evaluation serves all. ``engine_reason``
    says why the engine named in the settings was chosen, where that was done earlier.
    """

    def __init__(
        self,
        program: Program,
        settings: Settings,
        held_out: Program | None = None,
        clock: Callable[[], float] = time.perf_counter,
        engine_reason: str | None = None,
    ) -> None:
        if not program.leaves:
            raise ValueError(
                "neither the model nor the guide has a parameter, so nothing is to be fitted: write pyro.param, "
                "and pyro.module(name, module) for a network"
            )
        self.program, self.settings, self.clock = program, settings, clock
        self._engine_reason = engine_reason or "asked for"
        self.rule = settings.rule(program.layered)
        one_thread_in_forks()
        start = clock()
        self.normaliser = float(program.total) if program.minibatch and settings.normalise == "datum" else 1.0
        self.schedule, self.held_out = settings.bound(), held_out
        if settings.num_seeds > 1 and isinstance(self.schedule, GrowingParticles) and self.schedule.snr is not None:
            raise ValueError(
                "GrowingParticles with snr follows the signal of one run: use num_seeds=1, or snr=None for a plan that "
                "all seeds share"
            )
        if self.schedule.at(0, ()).analytic_kl:
            program.analytic = closed_form_sites(program)
        self._stages: dict[Objective, _Stage] = {}
        self._stale = False
        self._enter(self.schedule.at(0, ()))
        self.compile_seconds = clock() - start

    @property
    def seeds(self) -> range:
        """The seeds of the run."""
        return range(self.settings.seed, self.settings.seed + self.settings.num_seeds)

    def of_seed(self, seed: int) -> Run:
        """The run of one of the seeds alone."""
        other = copy.copy(self)
        other.settings, other._stages = replace(self.settings, seed=seed, num_seeds=1), {}
        return other

    def _enter(self, objective: Objective, step: int = 0) -> None:
        """Make ``objective`` the one in force: engine, judge and noise of its own, kept for when it comes back."""
        if objective not in self._stages:
            settings = self.settings
            rule = bind(self.rule, self.program, objective, self.normaliser)
            engine = make_engine(
                settings.engine,
                self.program,
                objective,
                rule,
                normaliser=self.normaliser,
                num_seeds=settings.num_seeds,
                steps=min(self.schedule.next_change(step) or settings.max_steps, settings.max_steps) - step,
                reason=self._engine_reason,
                amp=settings.amp,
            )
            if not self._stages:
                dear = width(engine.calculus) > WIDE or not engine.calculus.vectorise
                self.strata = settings.strata or (SPARSE if dear else Strata())
            judge = Judge(
                engine.calculus,
                settings.seed,
                gradients=settings.num_gradients,
                tolerance=settings.tol,
                held_out=self.held_out,
                looks=settings.num_seeds * self.strata.count(settings.max_steps) if engine.name == "compiled" else 0,
            )
            stream = self._stream(objective, settings.num_seeds)
            self._stages[objective] = _Stage(engine, judge, stream)
        self.objective = objective
        self.engine, self.judge, self.stream = self._stages[objective]

    def _stream(self, objective: Objective, num_seeds: int) -> Stream:
        return Stream(self.program, self.settings.seed, "optimise", objective.draws, num_seeds=num_seeds)

    def start(self, *starts: Tensor) -> FitState:
        """The state before the first step, from the parameters of every seed."""
        if len(starts) != len(self.seeds):
            raise ValueError(f"a run of {len(self.seeds)} seeds needs as many starts, got {len(starts)}")
        monitor = MonitorState(judges_held_out=self.held_out is not None)
        state = joined([FitState(start_carry(self.rule, x), monitor=monitor) for x in starts])
        return state._replace(seconds={"compile": self.compile_seconds}, buffers=self.program.changing_buffers())

    def advance(self, state: FitState, max_steps: int, on_event: Callable[[FitState, bool], None]) -> FitState:
        """Go on until done, not finite, or ``max_steps``; ``on_event(state, looked)`` after every chunk.

        A check that :meth:`finish` made inside a window is dropped, so that a resumed run decides as one never stopped.
        """
        left = [not one.ended and one.step < max_steps for one in state.seeds]
        state = self._each(state, left, lambda _, one: _without_late_checks(one))
        restore_buffers(of_modules(self.program.modules, state.buffers))
        while any(left := [not one.ended and one.step < max_steps for one in state.seeds]):
            step = min(one.step for one, goes in zip(state.seeds, left, strict=True) if goes)
            active = [goes and one.step == step for one, goes in zip(state.seeds, left, strict=True)]
            moving = [one for one, goes in zip(state.seeds, active, strict=True) if goes]
            index = len(moving[0].monitor.looks)
            look_at = self.strata.random_step(self.settings.seed, index)
            self._enter(self.schedule.at(step, moving[0].monitor.looks), step)
            if step == look_at:
                state = self._look(state, active, index, step)
                on_event(state, True)
                continue
            ahead = [one.step for one, goes in zip(state.seeds, left, strict=True) if goes and one.step > step]
            window_end = min(self._window_end(one) for one in moving)
            block_end = (step // BLOCK + 1) * BLOCK
            change = self.schedule.next_change(step) or block_end
            end = min(look_at, window_end, max_steps, block_end, change, *ahead)
            state = self._chunk(state, active, step, end - step)
            closing = [
                goes and not one.frozen and one.step == self._window_end(one)
                for one, goes in zip(state.seeds, active, strict=True)
            ]
            if any(closing):
                state = self._close_window(state, closing)
            on_event(state, any(closing))
        return state

    def finish(self, state: FitState) -> FitState:
        """A check of the returned parameters of every seed, if its last one was of others."""
        start = self.clock()

        def check(seed: int, one: FitState) -> FitState:
            made = one.checks[-1].step if one.checks else -1
            if one.step == 0 or made == one.step:
                return one
            x = newest(one, self.settings)
            return one if x is one.previous and made >= one.window_start else self._check(seed, one, x, final=True)

        checked = self._each(state, [not one.frozen for one in state.seeds], check)
        if all(now.checks is old.checks for now, old in zip(checked.seeds, state.seeds, strict=True)):
            return state
        return self._timed(checked, "monitor", start)

    def compare(self, state: FitState) -> Tensor:
        """Losses ``(S, n)`` of what each seed returns, in total nats, on the same noise."""
        self._enter(self.schedule.at(state.step, state.monitor.looks))
        return self.judge.compare([returned(one, self.settings) for one in state.seeds])

    def _each(self, state: FitState, which: Sequence[bool], move: Callable[[int, FitState], FitState]) -> FitState:
        """Move some of the seeds."""
        triples = zip(self.seeds, state.seeds, which, strict=True)
        return joined([move(seed, one) if goes else one for seed, one, goes in triples])

    def _window_end(self, state: FitState) -> int:
        return 2 * state.window_start if state.window_start else self.settings.window

    def _timed(self, state: FitState, name: str, start: float) -> FitState:
        """The state with the time since ``start`` added."""
        seconds = dict(state.seconds)
        seconds[name] = seconds.get(name, 0.0) + self.clock() - start
        return state._replace(seconds=seconds)

    def _chunk(self, state: FitState, active: Sequence[bool], step: int, count: int) -> FitState:
        """Steps of the active seeds; the engine moves the others as well, which is not kept."""
        start = self.clock()
        carry, losses = self.engine.advance(Carry.stack([one.carry for one in state.seeds]), self.stream, step, count)
        made = dict(
            zip(self.seeds, zip(carry.unstack(), losses.reshape(count, -1).unbind(1), strict=True), strict=True)
        )

        def move(seed: int, one: FitState) -> FitState:
            own, column = made[seed]
            steps = int(own.step) - one.step
            record = ((step, steps, float(column[:steps].mean())),) if steps else ()
            return one._replace(carry=own, losses=(*one.losses, *record))

        state = self._each(state, active, move)._replace(buffers=self.program.changing_buffers())
        return self._timed(state, "steps", start)

    def _look(self, state: FitState, active: Sequence[bool], index: int, step: int) -> FitState:
        start = self.clock()
        triples = zip(self.seeds, state.seeds, active, strict=True)
        seen = self.judge.look({seed: one.carry.x for seed, one, goes in triples if goes}, index, step)

        def note(seed: int, one: FitState) -> FitState:
            grams, losses, noise, unseen = seen[seed]
            if not all(usable(gram) for gram in grams.values()):
                return one._replace(carry=one.carry._replace(bad=one.carry.step.clone()))
            entry = self._entry(step, index, grams, losses, noise)
            if unseen is not None and all(usable(gram) for gram in unseen[0].values()):
                entry = entry._replace(held_out=self._entry(step, index, *unseen, None)._replace(noise={}))
            return one._replace(monitor=update(one.monitor, entry))

        return self._timed(self._each(state, active, note), "monitor", start)

    def _entry(
        self, step: int, index: int, grams: dict[str, Tensor], losses: Tensor, noise: Mapping[str, float] | None
    ) -> Look:
        bound, error = -float(losses.mean()), float(losses.std()) / len(losses) ** 0.5
        return look(step, index, self.strata.bounds(index), grams, bound=bound, bound_error=error, noise=noise)

    def _check(self, seed: int, state: FitState, x: Tensor, *, final: bool = False) -> FitState:
        weights = self.engine.calculus.log_weights
        if isinstance(weights, TracedLogWeights) and not self._stale and weights.differs(x):
            self._stale = True
            warnings.warn(
                f"at step {state.step:,} the model has other densities than its graph, traced before the first step: "
                "a number that it reads from Python has changed since, which steps do not follow; fit with "
                'engine="eager", or leave the change out',
                stacklevel=2,
            )
        best = state.previous if state.best_step == state.window_start else state.best
        check = self.judge.of_seed(seed).check(state.step, x, state.previous, best, final=final)
        return state._replace(checks=(*state.checks, check))

    def _close_window(self, state: FitState, closing: Sequence[bool]) -> FitState:
        """Check the seeds whose window ends; each is done, or begins another."""
        start = self.clock()

        def close(seed: int, one: FitState) -> FitState:
            x = newest(one._replace(previous=None), self.settings)
            one = self._with_best(self._check(seed, one, x), x)
            settled = self.schedule.settled(one.step, one.monitor.looks)
            if settled and self._is_done(one):
                return one._replace(done=True)
            return self._next_window(one, x)

        return self._timed(self._each(state, closing, close), "monitor", start)

    def _with_best(self, one: FitState, x: Tensor) -> FitState:
        """The best window so far on held-out rows: the one that has just been checked, where it is better for sure."""
        over = one.checks[-1].over_best
        if over is None or not (one.best is None or is_better(over, self.settings.tol)):
            return one
        return one._replace(best=x.clone(), best_step=one.step)

    def _is_done(self, one: FitState) -> bool:
        """The stopping rule; the trend, which costs more than all else in it, only where it could still object."""
        tol, last = self.settings.tol, one.checks[-1]
        if is_cut_off(last) and last.improvement.high is not None:
            return last.improvement.high < tol
        if self.held_out is not None:
            return is_over(one.checks, {name: found.trend for name, found in self.trends(one).items()}, tol)
        return is_done(one.checks, "undecided", tol) and is_done(one.checks, self.trend(one)[0], tol)

    def next_window(self, state: FitState) -> FitState:
        """Let the seeds that are done go on: what they returned is what their next window is compared with."""
        done = [one.done for one in state.seeds]
        return self._each(state, done, lambda _, one: self._next_window(one, newest(one, self.settings)))

    def _next_window(self, state: FitState, x: Tensor) -> FitState:
        """Begin a window; ``x`` is what the last one returned."""
        carry = state.carry
        if self.settings.average != "all":
            carry = carry._replace(average=empty_average(carry.x))
        return state._replace(carry=carry, previous=x.clone(), window_start=state.step, done=False)

    def trend(self, state: FitState) -> tuple[Any, str]:
        """Trend of the squared gradient norm, and its sentence."""
        plateau = figures(state).rate.plateau
        return plateau.trend, plateau.reason

    def trends(self, state: FitState) -> dict[str, Plateau]:
        """The plateau test of every group of parameters apart."""
        monitor, steps = state.monitor, state.step + 1 if state.monitor.looks else None
        runs = {group: series(monitor, group, steps=steps) for group in self.program.present_groups}
        return {group: plateau(run) for group, run in runs.items() if run is not None}

    def failure(self, state: FitState) -> str:
        """Which site at which step of this seed was not finite first; empty while all is well."""
        bad = int(state.carry.bad)
        if bad < 0:
            return ""
        stream = self._stream(self.schedule.at(state.step, state.monitor.looks), 1)
        feed = next(stream.steps(bad, 1))
        where = self.program.first_bad_site(state.carry.x, feed.noise.at(0), feed.batch(self.program, 0))
        return f"step {bad}: {where}"


def _without_late_checks(state: FitState) -> FitState:
    return state._replace(checks=tuple(c for c in state.checks if c.step <= state.window_start))
