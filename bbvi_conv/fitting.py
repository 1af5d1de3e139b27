"""``fit``: a model in, a :class:`Fit` with a verdict out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bbvi_conv.monitor.distance import scaled
from bbvi_conv.monitor.intervals import unavailable
from bbvi_conv.monitor.judge import Check
from bbvi_conv.monitor.seeds import Agreement, agreement, highest
from bbvi_conv.monitor.state import signal_to_noise, summary
from bbvi_conv.objectives import Objective
from bbvi_conv.program.buffers import copies_of, restore_buffers
from bbvi_conv.program.build import positional
from bbvi_conv.program.device import cpu_by_default, home
from bbvi_conv.program.noise import generator
from bbvi_conv.program.program import Params
from bbvi_conv.progress import Progress
from bbvi_conv.recipe import ModelSource, Recipe
from bbvi_conv.run import FitState, OnLook, Run, Settings, figures, prefers_best, returned
from bbvi_conv.settings import encode
from bbvi_conv.starts import starts
from bbvi_conv.verdict import Evidence, Verdict, decide, decide_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbvi_conv.archive import Archive
    from bbvi_conv.evaluate import Latents
    from bbvi_conv.posterior import Tail
    from bbvi_conv.theory import Assumptions


@cpu_by_default
def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: dict[str, Any] | None = None,
    *,
    init: Fit | None = None,
    held_out: tuple[Any, ...] | Tensor | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    on_look: OnLook | None = None,
    source: ModelSource | None = None,
    **settings: Any,
) -> Fit:
    r"""Fit a Pyro model by variational inference and say whether the answer can be trusted.

    Minimises the negative bound over the parameters of model and guide, looks at one random iterate per stratum of
    steps, checks the returned parameters whenever a window of steps is complete (windows double), and stops when the
    remaining gap :math:`\tfrac12 g^\top H^{-1} g` is under ``tol`` nats and the paired improvement does not contradict.

    With ``num_seeds=S`` it does so S times at once, independently: the run of index s has the noise and the start of a
    fit with ``seed + s``. What is returned is the one with the highest bound, :attr:`Fit.seeds` holds all of them, and
    the verdict says whether they agree.

    Args:
        model: a Pyro model, called as ``model(*args, **kwargs)``.
        guide: a Pyro guide; None: ``family(model)``.
        args: positional arguments; with a minibatch, tensors with N rows are gathered.
        kwargs: keyword arguments.
        init: an earlier fit, at whose parameters of the same name and shape this one starts; another family starts at
            the locations and scales of its sites.
        held_out: positional arguments over held-out rows; needs a minibatch of gathered rows. They judge improvement
            from window to window: a model that overfits is stopped, and the window that they like best is returned.
        out: a new run directory: checkpoints at every look, then verdict, posterior and report.
        progress: show a progress bar on a terminal.
        on_look: called with the :class:`~bbvi_conv.run.FitState` after every look and check; torch's default device is
            the CPU meanwhile.
        source: the file the model came from, for the run directory.
        **settings: fields of :class:`~bbvi_conv.run.Settings`, such as ``family``, ``objective`` and ``optimiser``.
            Without ``device`` it runs where the first tensor of ``args`` and ``kwargs`` that is not on the CPU lies;
            where there is none, on torch's default device.

    Returns:
        The fit; "not converged" is a verdict, not an exception.

    Raises:
        ValueError: bad input, in one sentence that names the site, argument or option and the way out.
        TypeError: an unknown setting.
    """
    recipe = Recipe.of(model, guide, args, kwargs, source, held_out)
    chosen = _chosen(recipe, settings)
    program = recipe.program(chosen)
    unseen = recipe.unseen(program)
    archive = None
    if out is not None:
        from bbvi_conv.archive import Archive

        archive = Archive.create(out)
    try:
        run = Run(program, chosen, unseen)
        state = run.start(*starts(program, chosen, recipe, init))
        if archive is not None:
            archive.describe(run, source)
    except BaseException:
        if archive is not None:
            archive.close()
        raise
    return _drive(run, state, chosen.max_steps, archive, source, progress, on_look)


_SETTINGS = [f.name for f in dataclasses.fields(Settings)]


def _chosen(recipe: Recipe, settings: dict[str, Any]) -> Settings:
    """The settings that are given, and what follows from model and data where they are not."""
    unknown = sorted(set(settings) - set(_SETTINGS))
    if unknown:
        raise TypeError(f"unknown setting {unknown[0]!r}; the settings are {', '.join(_SETTINGS)}")
    given = _given(settings)
    if recipe.guide is not None and "family" in given:
        raise ValueError("give a guide or a family, not both: the family would make another guide")
    return Settings(**{"device": home(recipe.args, recipe.kwargs), **given})


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Without those for which None says that they are not."""
    return {name: value for name, value in settings.items() if value is not None or name not in ("family", "device")}


def _drive(
    run: Run,
    state: FitState,
    max_steps: int,
    archive: Archive | None,
    source: ModelSource | None,
    progress: bool,
    on_look: OnLook | None,
) -> Fit:
    """Advance to the end, or to Ctrl-C, keeping the run directory up to date; then conclude."""
    if archive is not None:
        archive.directory.lock()  # before any step: a second writer is refused at once
    latest, interrupted = state, False
    before = copies_of(run.program.modules)
    with Progress(run, max_steps, shown=progress) as bar:

        def on_event(now: FitState, looked: bool) -> None:
            nonlocal latest
            latest = now
            bar.show(now)
            if looked:
                if archive is not None:
                    archive.keep(now, run.settings.seed)
                if on_look is not None:
                    on_look(now)

        try:
            latest = run.finish(run.advance(state, max_steps, on_event))
        except KeyboardInterrupt:
            interrupted = True
            with suppress(KeyboardInterrupt):  # a second one skips the check of what is returned
                latest = run.finish(latest)
        except BaseException:
            if archive is not None:
                with closing(archive):
                    archive.checkpoint(latest, run.settings.seed)
            raise
    result = Fit(run, latest, archive=archive, source=source, interrupted=interrupted)
    if run.settings.update_modules:
        run.program.write_back(result.x)
    else:
        restore_buffers(before)
    result.decide()
    if archive is not None:
        try:
            archive.conclude(result)
        finally:
            archive.close()
    return result


class Fit:
    """A fitted model: parameters, verdict, and what follows from them.

    Attributes:
        program: the traced model and guide.
        settings: what was asked for.
        state: everything the run is, as plain data.
        best: index of the seed whose parameters are returned: the one with the highest bound.
        x: the returned parameters, flat and unconstrained, ``(P,)``.
        interrupted: whether Ctrl-C ended the run.
    """

    def __init__(
        self,
        run: Run,
        state: FitState,
        *,
        archive: Archive | None = None,
        source: ModelSource | None = None,
        interrupted: bool = False,
    ) -> None:
        self.run, self.state, self.archive, self.source = run, state, archive, source
        self.interrupted = interrupted
        self.program, self.settings = run.program.with_buffers(state.buffers), run.settings
        self._losses = run.compare(state) if state.others else None
        self.best = 0 if self._losses is None else highest(self._losses, [one.frozen for one in state.seeds])
        self.x = returned(state.seeds[self.best], run.settings).detach().clone()
        self.seconds: dict[str, float] = dict.fromkeys(("steps", "monitor", "compile", "export"), 0.0)
        self.seconds.update(state.seconds)

    @cached_property
    @cpu_by_default
    def verdict(self) -> Verdict:
        """Outcome, numbers, reasons; over all seeds, where there are several."""
        return self._verdict() if len(self.seeds) == 1 else self._verdict_of_seeds()

    def decide(self) -> Verdict:
        """Come to the verdict now, if that was not done."""
        return self.verdict

    @cached_property
    def seeds(self) -> tuple[Fit, ...]:
        """A fit of every seed, as one that ran alone; of a single seed, itself."""
        if not self.state.others:
            return (self,)
        pairs = zip(self.run.seeds, self.state.seeds, strict=True)
        more: dict[str, Any] = {"source": self.source, "interrupted": self.interrupted}
        return tuple(Fit(self.run.of_seed(seed), one, **more) for seed, one in pairs)

    def __repr__(self) -> str:
        return f"<Fit: {self.verdict.outcome} after {self.state.step} steps on the {self.engine_name} engine>"

    @property
    def engine_name(self) -> str:
        """The engine that ran the steps."""
        return self.run.engine.name

    @property
    def engine_reason(self) -> str:
        """Why that engine."""
        return self.run.engine.reason

    @property
    def objective(self) -> Objective:
        """The bound and estimator in force at the end; under a schedule, the one it had come to."""
        return self.run.schedule.at(self.state.step, self.state.seeds[self.best].monitor.looks)

    @property
    def params(self) -> Params:
        """Unconstrained leaves by group: ``{"theta": {name: tensor}, "phi": ..., "shared": ...}``."""
        return self.program.params(self.x)

    @property
    def constrained_params(self) -> dict[str, Tensor]:
        """Parameters by name, as the model and guide see them."""
        return self.program.constrained(self.x)

    @property
    def guide(self) -> Callable[..., Any]:
        """The guide with the fitted values, in a parameter store of its own."""
        return self.program.bind(self.program.guide, self.x)

    @property
    def model(self) -> Callable[..., Any]:
        """The model with the fitted values, in a parameter store of its own."""
        return self.program.bind(self.program.model, self.x)

    @cpu_by_default
    def sample(
        self, num_samples: int = 1000, *, seed: int | None = None, rows: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Independent draws of every latent and deterministic site from q, each ``(num_samples, ...)``, constrained.

        Args:
            num_samples: S.
            seed: of the noise; None: that of the fit.
            rows: which rows of the data to see where a plate is subsampled, ``(R,)``; None: the first B. With latents
                of single rows and of all, at most B.

        Raises:
            ValueError: S below 1, or rows that do not fit the program.
        """
        from bbvi_conv.posterior import draw

        drawn = draw(self.program, self.x, num_samples, self.settings.seed if seed is None else seed, rows)
        return {**drawn.latent, **drawn.deterministic}

    @cpu_by_default
    def to_arviz(self, num_samples: int = 1000) -> Any:
        """Posterior in ArviZ's form: ``InferenceData`` (ArviZ 0.2x) or ``DataTree`` (ArviZ 1.x).

        With several seeds each is a chain, so that ArviZ's R-hat says whether they agree; the draws of the best alone
        are those of ``fit.seeds[fit.best].to_arviz()``.
        """
        from bbvi_conv.posterior import to_arviz

        return to_arviz(self, num_samples)

    @cpu_by_default
    def plot(self, kind: str) -> Figure:
        """Figure of ``"gradient_norm"``, ``"bound"``, ``"gap"`` or ``"rate"``.

        Of a model that decodes the latents of single data ``"latents"`` too, and where it decodes them into images
        ``"reconstructions"``, ``"samples"`` and ``"traversals"``.

        Raises:
            ValueError: an unknown kind, or one that this fit has none of, and why.
        """
        from bbvi_conv.plots import plot

        return plot(self, kind)

    @cached_property
    @cpu_by_default
    def use_of_latents(self) -> Latents:
        """KL and activity of every coordinate of the latents of single data, over the rows that figures show.

        :func:`bbvi_conv.evaluate.latents` takes any data, and as many rows and draws as are wanted.
        """
        from bbvi_conv.decoded import measured

        return measured(self)

    @cpu_by_default
    def assumptions(self, *, log_concave: bool | None = None) -> Assumptions:
        """What convergence theorems ask of this fit, at its parameters; see :func:`bbvi_conv.assumptions`."""
        from bbvi_conv.theory import of_fit

        with self.program.networks_kept():
            return of_fit(self, log_concave)

    @cpu_by_default
    def resume(self, steps: int | None = None, *, progress: bool = True, on_look: OnLook | None = None) -> Fit:
        """Go on where this fit stands: up to ``max_steps``, the same bits as a run never stopped; or ``steps`` more.

        With ``steps`` a fit that is done goes on as well, and may be done again at the end of a later window.

        Raises:
            ValueError: ``steps`` below 1, or a fit that diverged.
        """
        state, settings = self.state, self.settings
        if steps is not None:
            if steps < 1:
                raise ValueError(f"steps must be at least 1, got {steps}")
            settings = dataclasses.replace(settings, max_steps=state.step + steps)
            state = self.run.next_window(state)
            if all(one.frozen for one in state.seeds):
                raise ValueError(
                    f"this fit diverged at step {int(state.carry.bad)} and cannot go on; refit with smaller steps"
                )
        self.run.settings = settings
        return _drive(self.run, state, settings.max_steps, self.archive, self.source, progress, on_look)

    @cpu_by_default
    def save(self, directory: str | Path) -> None:
        """Write this fit to a new run directory; :func:`bbvi_conv.load` reads it."""
        from bbvi_conv.archive import Archive

        archive = Archive.create(directory)
        archive.describe(self.run, self.source)
        archive.conclude(self)
        archive.close()

    def _evidence(self) -> Evidence:
        """What the verdict on one seed rests on."""
        trend, reason = self.run.trend(self.state)
        signal = signal_to_noise(self.state.monitor, "phi")
        parts = self.run.trends(self.state) if self.run.held_out is not None else {}
        seen = Evidence(self.state.checks, trend, reason, self.run.failure(self.state), self.interrupted, signal)
        outside = "" if seen.failure or not seen.checks else self._leaves_support()
        return seen._replace(parts=parts, best_step=self.state.best_step, outside=outside)

    def _leaves_support(self) -> str:
        """Which site has no density at some of a few draws."""
        program = self.program
        noise = program.layout.draw(generator(self.settings.seed, "support", 0, program.device), 8, dtype=program.dtype)
        with program.networks_kept():
            return program.leaves_support(self.x, noise, program.example()[1])

    def _verdict(self) -> Verdict:
        evidence = self._evidence()
        tail, threshold = self._tail(evidence)
        verdict = decide(evidence, self.settings.tol, tail.khat, threshold, tail.effective)
        return dataclasses.replace(verdict, numbers=self._numbers(tail, threshold))

    def _verdict_of_seeds(self) -> Verdict:
        """Each seed by itself, k-hat for the best only; then whether they agree."""
        evidence = [fit._evidence() for fit in self.seeds]
        best = self.seeds[self.best]
        tail, threshold = best._tail(evidence[self.best])
        of_best = (tail.khat, threshold, tail.effective)
        other = (unavailable("asked for at the best seed only: fit.seeds[i].verdict has it"), None)
        verdicts = {
            seed: decide(seen, self.settings.tol, *(of_best if fit is best else other))
            for seed, fit, seen in zip(self.run.seeds, self.seeds, evidence, strict=True)
        }
        found = self.agreement()
        verdict = decide_seeds(verdicts, self.run.seeds[self.best], found)
        each = []
        for seed, fit in zip(self.run.seeds, self.seeds, strict=True):
            own = fit._distances()
            compared = {"below_best_nats": found.shortfall, "distance_sd": found.distance}
            own |= {name: by_seed[seed].to_json() for name, by_seed in compared.items() if seed in by_seed}
            each.append({"seed": seed, "outcome": verdicts[seed].outcome, "steps": fit.state.step, **own})
        agreed = {"best": self.run.seeds[self.best], "disagree": list(found.disagree), "each": each}
        return dataclasses.replace(verdict, numbers={**best._numbers(tail, threshold, self), "seeds": agreed})

    def agreement(self) -> Agreement:
        """Bounds and posterior locations of the seeds beside those of the best, by seed; frozen ones are left out."""
        from bbvi_conv.posterior.moments import moments

        losses = self._losses if self._losses is not None else self.run.compare(self.state)
        running = {seed: i for i, (seed, one) in enumerate(zip(self.run.seeds, self.state.seeds, strict=True))}
        running = {seed: i for seed, i in running.items() if not self.state.seeds[i].frozen or i == self.best}
        located = moments(self.program, [self.seeds[i].x for i in running.values()], self.settings.seed)
        return agreement(
            losses[list(running.values())], list(running), self.run.seeds[self.best], located, self.settings.tol
        )

    def _tail(self, evidence: Evidence) -> tuple[Tail, float | None]:
        from bbvi_conv.posterior import Tail, khat_threshold, tail

        if evidence.failure or not evidence.checks:
            return Tail(unavailable("the run made no check" if not evidence.failure else "the run diverged")), None
        draws, seed = self.settings.khat_draws, self.settings.seed
        return tail(self.program, self.x, num_samples=draws, seed=seed), khat_threshold(draws)

    def _distances(self) -> dict[str, Any]:
        """Numbers of the check of what one seed returns, and its last improvement."""
        missing = unavailable("no check was made: run more steps")
        last = self.state.checks[-1] if self.state.checks else None
        own = self.returned_check
        return {
            "remaining_gap_nats": (own.gap if own else missing).to_json(),
            "natural_gradient_norm": (own.natural if own else missing).to_json(),
            "paired_improvement": (last.improvement if last else missing).to_json(),
            "bound": (own.bound if own else missing).to_json(),
        }

    @property
    def returned_check(self) -> Check | None:
        """The check of the parameters that are returned; None before the first."""
        state = self.state.seeds[self.best]
        if not prefers_best(state, self.settings.tol):
            return state.checks[-1] if state.checks else None
        return next(check for check in state.checks if check.step == state.best_step)

    def _held_out_numbers(self) -> dict[str, Any]:
        """What held-out rows say, where there are any; in the units of the looks."""
        unseen, last = self.run.held_out, self.returned_check
        if unseen is None:
            return {}
        missing = unavailable("no check was made: run more steps")
        newest = self.state.checks[-1] if self.state.checks else None
        monitor = self.state.monitor.held_out
        norms = summary(monitor, steps=self.state.step + 1 if monitor.looks else None).gradient_norm_sq
        return {
            "held_out": {
                "rows": unseen.total,
                "bound_per_datum": scaled(last.bound if last else missing, 1 / self.program.total).to_json(),
                "over_best_nats": ((newest and newest.over_best) or missing).to_json(),
                "training_over_best_nats": ((newest and newest.training) or missing).to_json(),
                "gradient_norm_sq": {group: norms[group].to_json() for group in ("theta", "phi", "total")},
                "returned_step": last.step if last else None,
            }
        }

    def _numbers(self, tail: Tail, threshold: float | None, whole: Fit | None = None) -> dict[str, Any]:
        """Everything ``verdict.json`` holds besides outcome and reasons; gradient norms and rate are over ``whole``."""
        whole = whole or self
        seen = figures(whole.state)
        return {
            **self._distances(),
            "tolerance_nats": self.settings.tol,
            "gradient_norm_sq": {
                **{g: seen.gradient_norm_sq[g].to_json() for g in ("theta", "phi", "total")},
                "over": seen.label,
                "per": "datum" if self.run.normaliser > 1 else "total",
            },
            "signal_to_noise": {g: signal_to_noise(self.state.monitor, g).to_json() for g in ("theta", "phi")},
            "rate": seen.rate.to_json(),
            "khat": {**tail.khat.to_json(), "threshold": threshold, "effective": tail.effective},
            "steps": whole.state.step,
            "seconds": dict(whole.seconds),
            "engine": {"name": whole.engine_name, "reason": whole.engine_reason},
            "unit": self.program.structure.describe(),
            "objective": encode(self.objective),
            **self._held_out_numbers(),
        }


@cpu_by_default
def load(
    directory: str | Path,
    *,
    model: Callable[..., Any] | None = None,
    guide: Callable[..., Any] | None = None,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    held_out: tuple[Any, ...] | Tensor | None = None,
    **settings: Any,
) -> Fit:
    """The fit in a run directory, as it stands; ``load(directory).resume()`` takes up a run that was killed.

    Args:
        directory: a run directory.
        model, guide, args, kwargs, held_out: as for :func:`fit`; needed where the model did not come from a file.
        **settings: settings that a file cannot hold (a family of your own), by name.

    Raises:
        ValueError: no run directory, a truncated checkpoint, or data that are not those of the run.
    """
    from bbvi_conv.archive import Archive

    archive = Archive.open(directory)
    own = None if model is None else Recipe.of(model, guide, () if args is None else args, kwargs)
    plan = archive.plan(own, None if held_out is None else positional(held_out), _given(settings))
    program = plan.recipe.program(plan.settings)
    archive.check_model(program)
    run = Run(program, plan.settings, plan.recipe.unseen(program), engine_reason=plan.engine_reason)
    state = archive.state(program.device)
    if state is None:
        state = run.start(*starts(program, plan.settings, plan.recipe))
    result = Fit(run, state, archive=archive, source=plan.recipe.source)
    if plan.settings.update_modules:
        result.program.write_back(result.x)
    result.decide()
    return result
