"""Judge one point: gradients, curvature and paired losses of a (program, objective), evaluated and put into numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bbvi_conv.engine.calculus import CHUNK, Calculus
from bbvi_conv.engine.streams import Feed, Stream, feed_of_all
from bbvi_conv.monitor.control import Control, fit_control, pilot_draws
from bbvi_conv.monitor.distance import (
    CUT_OFF,
    DENSE,
    PRODUCTS,
    equilibration,
    half_norm,
    half_norm_by_products,
    paired_improvement,
    rounding_error,
    scaled,
)
from bbvi_conv.monitor.gradient_norm import gram_matrix, trace_of_covariance
from bbvi_conv.monitor.intervals import Estimate, unavailable
from bbvi_conv.objectives.objective import Objective
from bbvi_conv.program.aten_graph import Untraceable
from bbvi_conv.program.program import Program

FIRST_DRAWS, MOST_DRAWS = 256, 4096
"""Gradients, or paired losses, at a check: the first number, and the most that a tight tolerance may ask for."""
GRADIENT_COST = 20_000_000
"""Draws times width that the gradients or losses of a check may cost; at least 32 draws are made."""
MATRIX_COST = 50_000_000
"""Products times draws times width that a curvature matrix may cost, beyond the fewest draws that tell something."""
ROUGH_COST = 2_000_000
"""The same, from which curvature is that of fewer draws as long as the run is sure to go on."""

FISHER_DRAWS = 64
"""Fewest draws of Fisher information that is had by products: of fewer, that of one scale among thousands is likely
negative. A draw of it takes the density of q alone."""

SURE = 10
"""Tolerances by which a window improves the bound where the run is sure to go on."""

WIDE = 20_000
"""Width beyond which each evaluation is dear: looks are sparser, and curvature is asked for only when it can decide."""
DEEP = 40
"""Operations on every number that an evaluation is taken to need; one that needs more is wider by as much."""


def width(calculus: Calculus) -> int:
    """Numbers that one evaluation works on: parameters, noise of all draws, or the batch for all draws."""
    program, draws = calculus.program, calculus.runs
    _, batch = program.example()
    read = draws * sum(a.numel() for a in batch.args)
    return max(sum(program.sizes), draws * sum(program.layout), read, calculus.work // DEEP, 1)


class Effort(NamedTuple):
    """What a check spends at one program: draws of gradients and losses, and how curvature is had.

    Attributes:
        first, most: draws to begin with, and at most.
        dense: whether the matrix is formed; otherwise it is known by products.
        matrix: draws its mean is over, spread evenly: 128 of them do about what 1,024 independent ones would.
        rough: as many inside a run while windows improve the bound by far more than the tolerance.
        dear: whether curvature waits until a window no longer improves the bound.
    """

    first: int
    most: int
    dense: bool
    matrix: int
    rough: int
    dear: bool


def effort(size: int, wide: int, *, vectorised: bool) -> Effort:
    """Effort for ``size`` parameters and evaluations that are ``wide``; run one by one they are dearer still.

    Example:
        >>> effort(65, 120, vectorised=True)
        Effort(first=256, most=4096, dense=True, matrix=128, rough=128, dear=False)
        >>> effort(175, 175, vectorised=True).rough
        32
    """
    afford = max(32, GRADIENT_COST // wide)
    first, most = (FIRST_DRAWS, MOST_DRAWS) if vectorised else (FIRST_DRAWS // 4, MOST_DRAWS // 16)
    dense = size <= DENSE and size * 64 * wide <= MATRIX_COST
    columns, least, top = (size, 64, 128 if vectorised else 64) if dense else (2 * PRODUCTS, 16, 256)
    matrix = max(least, min(top, MATRIX_COST // (columns * wide)))
    rough = max(16, matrix // 4) if columns * matrix * wide > ROUGH_COST else matrix
    return Effort(min(first, afford), min(most, afford), dense, matrix, rough, wide > WIDE)


UNSEEN = "monitor held out"
"""Stream of the looks at held-out rows."""
TRAINING_GRADIENTS = 8
"""Gradients by the estimator that trains at a look: enough for the trace of their covariance."""


class Check(NamedTuple):
    """What a check says of the newest parameters; all numbers in total nats.

    Attributes:
        step: optimiser steps made.
        gap: ``remaining_gap``.
        natural: ``natural_gradient_norm``.
        improvement: ``paired_improvement`` over the average of the last window; where there are held-out rows, on them.
        bound: the bound, with the interval of its Monte Carlo mean; where there are held-out rows, on them.
        over_best: where there are held-out rows, the paired improvement on them over the best window so far.
        training: the same on the rows that train.
    """

    step: int
    gap: Estimate
    natural: Estimate
    improvement: Estimate
    bound: Estimate
    over_best: Estimate | None = None
    training: Estimate | None = None

    @property
    def on_held_out(self) -> bool:
        """Whether held-out rows judged."""
        return self.over_best is not None


class Seen(NamedTuple):
    """What a look sees of one seed.

    Attributes:
        grams: Gram matrix ``(J, J)`` per group of parameters, by the quietest estimator.
        losses: ``(J,)``.
        noise: trace of the covariance of one gradient that trains, per group; None where looks are by that estimator.
        held_out: Gram matrices and losses as above at held-out rows, where there are any.
    """

    grams: dict[str, Tensor]
    losses: Tensor
    noise: dict[str, float] | None
    held_out: tuple[dict[str, Tensor], Tensor] | None = None


def quietest(calculus: Calculus) -> tuple[Calculus, str]:
    """The same gradient by the least noisy valid estimator; or ``calculus`` itself, and the reason why."""
    objective = calculus.objective.quietest()
    if objective == calculus.objective:
        return calculus, ""
    try:
        quiet = _with_objective(calculus, objective)
        quiet.gradients(calculus.program.initial(), Stream(calculus.program, 0, "monitor", objective.draws).once(0, 1))
    except (Untraceable, NotImplementedError, KeyError, ValueError, RuntimeError) as error:
        return calculus, f"the guide's density at a given value is not to be had ({error})"
    return quiet, ""


def _with_objective(calculus: Calculus, objective: Objective) -> Calculus:
    if objective == calculus.objective:
        return calculus
    return Calculus(calculus.program, objective, calculus.log_weights, calculus.normaliser)


def grams_by_group(program: Program, gradients: Tensor) -> dict[str, Tensor]:
    """Gram matrix ``(J, J)`` of gradients ``(J, P)`` for every group that has parameters."""
    return {group: gram_matrix(gradients[:, part]) for group, part in program.present_groups.items()}


class Judge:
    """Evaluates looks and checks with noise of their own, by the quietest valid estimator.

    Args:
        calculus: the training loss and its traced or eager functions.
        seed: seed of the run; streams ``monitor`` and ``evaluate`` are independent of training.
        gradients: J, independent gradients at a look.
        tolerance: nats, for the number of draws at a check.
        held_out: the same program over held-out rows, for the bound and the paired improvement; and for norms and bound
            at looks, on a stream of their own.
        looks: how many are expected, of all seeds: where they repay it, their gradients are compiled.
    """

    def __init__(
        self,
        calculus: Calculus,
        seed: int,
        *,
        gradients: int = 32,
        tolerance: float = 0.01,
        held_out: Program | None = None,
        looks: int = 0,
    ) -> None:
        self.calculus, self.seed, self.count, self.tolerance = calculus, seed, gradients, tolerance
        self.quiet, self.estimator_note = quietest(calculus)
        if looks:
            self.quiet.compile_gradients(looks * gradients)
        if looks and self.quiet is not calculus:
            calculus.compile_gradients(looks * min(gradients, TRAINING_GRADIENTS))
        self.cheap = _with_objective(self.quiet, self.quiet.objective.single())
        self.plain = _with_objective(calculus, calculus.objective.plain())
        self.unseen = None if held_out is None else self.quiet.on(held_out)
        self.compared = self.plain if self.unseen is None else _with_objective(self.unseen, self.plain.objective)

    def _feed(self, calculus: Calculus, stream: str, key: int, count: int, *, spread: bool = False) -> Feed:
        return Stream(calculus.program, self.seed, stream, calculus.objective.draws).once(key, count, spread=spread)

    def of_seed(self, seed: int) -> Judge:
        """The same judge with the noise of another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other

    # ---- looks ----

    def look(self, points: Mapping[int, Tensor], stratum: int, step: float = math.inf) -> dict[int, Seen]:
        """What J gradients say at the point of each seed, by its own noise; schedules as at ``step``."""
        quiet = self._gradients(self.quiet, points, stratum, self.count, step)
        unseen = {} if self.unseen is None else self._gradients(self.unseen, points, stratum, self.count, step, UNSEEN)
        noise: dict[int, dict[str, float] | None] = dict.fromkeys(points)
        if self.quiet is not self.calculus:
            few = self._gradients(self.calculus, points, stratum, min(self.count, TRAINING_GRADIENTS), step)
            noise = {seed: self._traces(grads) for seed, (grads, _) in few.items()}
        program = self.calculus.program
        held_out = {s: (grams_by_group(program, grads), losses) for s, (grads, losses) in unseen.items()}
        return {
            s: Seen(grams_by_group(program, grads), losses, noise[s], held_out.get(s))
            for s, (grads, losses) in quiet.items()
        }

    def _gradients(
        self,
        calculus: Calculus,
        points: Mapping[int, Tensor],
        stratum: int,
        count: int,
        step: float,
        stream: str = "monitor",
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """J gradients ``(J, P)`` and losses ``(J,)`` by seed; narrow uncompiled ones all at once."""
        draws = calculus.objective.draws
        feeds = {s: Stream(calculus.program, s, stream, draws).once(stratum, count) for s in points}
        if len(points) == 1 or calculus.compiled or len(points) * count * width(calculus) > CHUNK:
            return {s: calculus.gradients(x, feeds[s], step=step) for s, x in points.items()}
        at = torch.stack(list(points.values())).repeat_interleave(count, 0)
        grads, losses = calculus.gradients(at, feed_of_all(list(feeds.values())), step=step)
        parts = zip(torch.split(grads, count), torch.split(losses, count), strict=True)
        return dict(zip(points, parts, strict=True))

    def _traces(self, gradients: Tensor) -> dict[str, float]:
        """Trace of the covariance of one gradient, per group."""
        grams = grams_by_group(self.calculus.program, gradients)
        return {group: trace_of_covariance(gram) for group, gram in grams.items()}

    def compare(self, points: Sequence[Tensor]) -> Tensor:
        """Losses ``(S, n)`` of S points in total nats, on the same noise and rows, which no check has seen."""
        spent = self._effort(self.compared, len(points[0]))
        feed = self._feed(self.compared, "compare seeds", 0, spent.most)
        return torch.stack([self.compared.losses(x, feed) for x in points]) * self.calculus.normaliser

    # ---- checks ----

    def check(
        self, step: int, x: Tensor, previous: Tensor | None, best: Tensor | None = None, *, final: bool = False
    ) -> Check:
        """Gap, natural-gradient norm, paired improvement and bound at ``x``; the noise depends on the step alone.

        ``best`` are the parameters that held-out rows like best so far, where there are such rows; they may be
        ``previous`` itself. ``final``: no step follows.
        """
        keys = _Keys(step)
        losses, improvement = self._compare(self.compared, x, previous, keys)
        known = self._against_best(x, best, improvement if best is previous else None, keys)
        found = self._check(step, x, losses, improvement, keys, final)
        return found if known is None else found._replace(over_best=known[0], training=known[1])

    def _against_best(
        self, x: Tensor, best: Tensor | None, known: Estimate | None, keys: _Keys
    ) -> tuple[Estimate, Estimate] | None:
        """Improvement over the best window on held-out rows, which may be known already, and on training rows."""
        if self.unseen is None:
            return None
        if best is None:
            none = unavailable("needs two windows of steps: run more steps")
            return none, none
        over = known or self._compare(self.compared, x, best, keys)[1]
        return over, self._compare(self.plain, x, best, keys)[1]

    def _check(self, step: int, x: Tensor, losses: Tensor, improvement: Estimate, keys: _Keys, final: bool) -> Check:
        mean, error = float(losses.mean()), float(losses.std()) / math.sqrt(len(losses))
        bound = scaled(Estimate(-mean, -mean - 1.96 * error, -mean + 1.96 * error), self.calculus.normaliser)
        size = len(x)
        if size == 0:
            none = unavailable("there are no parameters to optimise")
            return Check(step, none, none, improvement, bound)
        low = math.inf if improvement.low is None else improvement.low
        if low > self.tolerance and self._effort(self.cheap, size).dear:
            reason = "a program this wide is only asked for it once a window no longer improves the bound"
            gap = unavailable(self._no_hessian() or reason)
            return Check(step, gap, unavailable(reason), improvement, bound)
        natural, gap = self._distances(x, keys, rough=low > SURE * self.tolerance and not final)
        return Check(step, gap, natural, improvement, bound)

    def _effort(self, calculus: Calculus, size: int) -> Effort:
        return effort(size, width(calculus), vectorised=calculus.vectorise)

    def _compare(self, calculus: Calculus, x: Tensor, previous: Tensor | None, keys: _Keys) -> tuple[Tensor, Estimate]:
        """Losses at ``x``, and the paired improvement over ``previous``, by as many draws as decide."""
        count, most = self._effort(calculus, len(x))[:2]
        losses, before = x.new_zeros(0), x.new_zeros(0)
        while True:
            feed = self._feed(calculus, "evaluate", keys.next(), count - len(losses))
            losses = torch.cat([losses, calculus.losses(x, feed)])
            if previous is None:
                reason = "needs two windows of steps: run more steps"
                return losses, unavailable(reason)
            before = torch.cat([before, calculus.losses(previous, feed)])
            improvement = scaled(paired_improvement(before, losses), self.calculus.normaliser)
            if count >= most or not _straddles(improvement, self.tolerance):
                return losses, improvement
            count = min(4 * count, most)

    def _distances(self, x: Tensor, keys: _Keys, *, rough: bool) -> tuple[Estimate, Estimate]:
        """Natural-gradient norm and gap; ``rough``: curvature from fewer draws."""
        program, factor = self.calculus.program, self.calculus.normaliser
        spent = self._effort(self.cheap, len(x))
        control = None if spent.dear else self._control(x, keys)
        feed = self._feed(self.cheap, "evaluate", keys.next(), spent.first)
        grads, _ = self.cheap.gradients(x, feed)
        active = torch.nonzero((grads != 0).any(0)).squeeze(-1)
        if len(active) == 0:
            still = Estimate(0.0, 0.0, 0.0, "every gradient is exactly zero")
            none = unavailable(CUT_OFF) if self._varies(x, feed) else still
            return none, none
        slices = program.groups
        variational = active[(active >= slices["phi"].start)]
        grads = grads if control is None else control.quiet(grads, feed.noise)
        hessian, fisher = self._hessian(x, active, keys, rough), self._fisher(x, variational, keys, rough)

        def gap() -> Estimate:
            name = "the Hessian of the loss (run on until the parameters are near a minimum)"
            return scaled(_half_norm(grads[:, active], hessian, name), factor)

        result = gap()
        while len(grads) < spent.most and _straddles(result, self.tolerance):
            more = min(4 * len(grads), spent.most) - len(grads)
            feed = self._feed(self.cheap, "evaluate", keys.next(), more)
            fresh, _ = self.cheap.gradients(x, feed)
            grads = torch.cat([grads, fresh if control is None else control.quiet(fresh, feed.noise)])
            result = gap()
        name = "the Fisher information of q (as estimated from few draws)"
        return scaled(_half_norm(grads[:, variational], fisher, name), factor), result

    def _varies(self, x: Tensor, feed: Feed) -> bool:
        """Whether the loss of the same rows differs from draw to draw."""
        rows = None if feed.rows is None else feed.rows[:1].expand_as(feed.rows)
        losses = self.cheap.losses(x, feed._replace(rows=rows))
        return float(losses.max() - losses.min()) > rounding_error(losses, losses.dtype)

    def _control(self, x: Tensor, keys: _Keys) -> Control | None:
        """Control variate for the gradients at ``x``, fitted on draws of its own; only where draws are cheap."""
        draws = pilot_draws(self._feed(self.cheap, "evaluate", keys.next(), 1).noise) if self.cheap.vectorise else 0
        if draws == 0:
            return None
        feed = self._feed(self.cheap, "evaluate", keys.next(), draws)
        return fit_control(self.cheap.gradients(x, feed)[0], feed.noise)

    def _matrix(
        self,
        calculus: Calculus,
        products: Callable[..., Tensor],
        x: Tensor,
        active: Tensor,
        keys: _Keys,
        rough: bool,
        least: int = 1,
    ) -> Tensor | _Products:
        """A mean curvature matrix on the active coordinates, or its products where forming it would cost too much."""
        spent = self._effort(calculus, len(active))
        draws = spent.rough if rough else spent.matrix
        feed = self._feed(calculus, "evaluate", keys.next(), draws if spent.dense else max(least, draws), spread=True)
        known = _Products(lambda vectors: products(x, vectors, feed), x, active)
        return known.dense() if spent.dense else known.scaled()

    def _no_hessian(self) -> str:
        """Why there is none wherever one looks; empty where there may be one."""
        program = self.calculus.program
        if program.implicit:
            return "a draw has an implicit gradient (gamma, beta or Dirichlet), which has no second derivative"
        if program.structure.score_sites:
            return (
                f"site {program.structure.score_sites[0]!r} has no pathwise gradient, hence no Hessian on fixed noise"
            )
        if not self.calculus.objective.conservative:
            return "theta and phi follow different bounds: their gradients are not those of one function"
        return ""

    def _hessian(self, x: Tensor, active: Tensor, keys: _Keys, rough: bool) -> Tensor | _Products | str:
        """The matrix, its products where it is large, or why there is none."""
        if none := self._no_hessian():
            return none
        try:
            return self._matrix(self.plain, self.plain.hessian_products, x, active, keys, rough)
        except (Untraceable, NotImplementedError, RuntimeError) as error:
            return f"the loss has no second derivative here ({error})"

    def _fisher(self, x: Tensor, active: Tensor, keys: _Keys, rough: bool) -> Tensor | _Products | str:
        """The matrix, its products where it is large, or why there is none."""
        if not self.cheap.objective.split:
            return self.estimator_note or "the guide's density at a given value is not to be had"
        if len(active) == 0:
            return "there are no variational parameters"
        try:
            return self._matrix(self.cheap, self.cheap.fisher_products, x, active, keys, rough, FISHER_DRAWS)
        except (Untraceable, NotImplementedError, RuntimeError) as error:
            return f"log q has no second derivative here ({error})"


def _half_norm(gradients: Tensor, matrix: Tensor | _Products | str, name: str) -> Estimate:
    if isinstance(matrix, str):
        return unavailable(matrix)
    if not bool(gradients.isfinite().all()):
        return unavailable("a gradient at the returned parameters is not finite: lower the step size or rescale")
    if isinstance(matrix, Tensor):
        return half_norm(gradients, matrix, name)
    return half_norm_by_products(gradients, matrix, matrix.scale, name)


class _Products:
    """Products of a curvature matrix restricted to the active coordinates.

    Attributes:
        scale: of every one of these, once :meth:`scaled` has found it.
    """

    scale: Tensor

    def __init__(self, products: Callable[[Tensor], Tensor], x: Tensor, active: Tensor) -> None:
        self._products, self._x, self._active = products, x, active

    def __call__(self, vectors: Tensor) -> Tensor:
        whole = self._x.new_zeros(len(vectors), len(self._x))
        whole[:, self._active] = vectors
        return self._products(whole)[:, self._active]

    def scaled(self) -> _Products:
        """Find the scale, by products."""
        self.scale = equilibration(self, self._x[self._active])
        return self

    def dense(self) -> Tensor:
        """All columns, made symmetric."""
        matrix = self(torch.eye(len(self._active), dtype=self._x.dtype, device=self._x.device))
        return 0.5 * (matrix + matrix.T)


class _Keys:
    """Keys of the evaluation stream for the check at one step, none used twice."""

    def __init__(self, step: int) -> None:
        self._next = 64 * step

    def next(self) -> int:
        """A fresh key."""
        self._next += 1
        return self._next


def _straddles(estimate: Estimate, tolerance: float) -> bool:
    """Whether more draws could decide on which side of the tolerance the estimate lies."""
    if estimate.low is None or estimate.high is None:
        return False
    return estimate.low <= tolerance <= estimate.high
