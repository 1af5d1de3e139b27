"""Losses, gradients and curvature products of (program, objective) at given parameters, noise and rows."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from bbvi_conv.engine.compiled_map import CompiledMap, compiled_where_it_pays, filled
from bbvi_conv.engine.streams import Feed, Stream
from bbvi_conv.objectives.objective import Objective
from bbvi_conv.program.aten_graph import Untraceable
from bbvi_conv.program.graphs import widest
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.program import Program
from bbvi_conv.program.terms import Terms
from bbvi_conv.program.trace import LogWeights, TracedLogWeights, over_draws, simplified

CHUNK = 20_000_000
"""Numbers a vectorised evaluation may hold per parameter-sized array."""
LANES, VECTORS = (8, 32, 128, 256), (1, 2, 8, 32)
"""Evaluations, and vectors of a curvature product, in one call of a mapped graph: few choices, each a graph."""
HANDLED = 20_000_000
"""Numbers that graphs compute in the time, some milliseconds, of a run of a program by Pyro's handlers."""
WORTH = 2**20
"""Numbers in an array from which more evaluations in one call gain nothing: torch's own work is then the cost."""


class _Draws:
    """All draws at one point, with live and detached copies of the parameters: what an objective evaluates."""

    def __init__(
        self,
        particles: LogWeights,
        strata: int,
        theta: dict[str, Tensor],
        phi: dict[str, Tensor],
        noise: Noise,
        batch: Batch,
        step: Tensor,
    ) -> None:
        self._particles, self._strata, self._noise, self._batch, self.step = particles, strata, noise, batch, step
        self._theta = ({name: value.detach() for name, value in theta.items()}, theta)
        self._phi = ({name: value.detach() for name, value in phi.items()}, phi)
        self.has_theta = bool(theta)

    def __call__(self, *, theta: bool = True, phi: bool = True, density: bool = True) -> Terms:
        """Index 0 holds detached values, 1 live ones; the same object twice means one run of the guide."""
        terms = self._particles(self._theta[theta], self._phi[phi], self._phi[density], self._noise, self._batch)
        if self._strata == 1:
            return terms
        # a mean over the strata, each by its own weight, which is differentiable
        weighted = {name: terms.weight * getattr(terms, name) for name in ("log_p", "log_q", "log_prior")}
        return terms._replace(**weighted)


class Calculus:
    """Pure functions of the flat parameters ``x`` ``(P,)``.

    With ``log_weights`` a :class:`~bbvi_conv.program.trace.TracedLogWeights`, each function becomes one graph of plain
    operations, mapped over draws by ``vmap``; with Pyro's handlers it runs as it stands, draw by draw.

    Args:
        program: the program.
        objective: the bound; the loss is its negative, divided by ``normaliser``.
        log_weights: traced graphs, or ``program.log_weights``.
        normaliser: N for nats per datum, 1 for total nats.

    Raises:
        Untraceable: where a graph is asked for and cannot be had.
    """

    def __init__(self, program: Program, objective: Objective, log_weights: LogWeights, normaliser: float) -> None:
        self.program, self.objective, self.normaliser = program, objective, normaliser
        self.log_weights = log_weights
        self.traced = isinstance(log_weights, TracedLogWeights)
        objective.validate(program)
        if isinstance(log_weights, TracedLogWeights):
            log_weights.prepare(joint=True)
            if objective.split:
                log_weights.prepare(joint=False)
        self.vectorise = isinstance(log_weights, TracedLogWeights) and log_weights.maps(joint=not objective.split)
        self.particles = over_draws(log_weights, (False, False, False, True, False), vectorise=self._many)
        self._graphs: dict[Any, Callable[..., Any]] = {}
        self._widths: dict[str, int] = {}
        self._compiled: CompiledMap | None = None

    @classmethod
    def of(cls, program: Program, objective: Objective, normaliser: float) -> Calculus:
        """With traced graphs where the program allows it, else by Pyro's handlers."""
        try:
            return cls(program, objective, TracedLogWeights(program), normaliser)
        except Untraceable:
            return cls(program, objective, program.log_weights, normaliser)

    @property
    def _many(self) -> bool:
        return self.vectorise and self.runs > 1

    @property
    def runs(self) -> int:
        """Runs of the program in one evaluation: every draw once per stratum."""
        return self.objective.draws * self.program.strata

    @functools.cached_property
    def work(self) -> int:
        """Numbers that one evaluation computes in all; by Pyro's handlers, as many as a graph would in that time."""
        one = self.log_weights.work if isinstance(self.log_weights, TracedLogWeights) else HANDLED
        return self.runs * one

    # ---- one evaluation ----

    def loss(self, x: Tensor, noise: Noise, batch: Batch, n: Tensor) -> Tensor:
        """Scalar loss at noise ``(draws, ...)`` and step number n: a function torch can differentiate."""
        theta, phi = self.program.split(x)
        score = bool(self.program.structure.score_sites)
        strata = self.program.strata
        noise = noise if strata == 1 else self.program.stratified(noise)
        evaluate = _Draws(self.particles, strata, theta, phi, noise, batch, n)
        return self.objective.surrogate(evaluate, scale=self.program.unit_scale, score=score) / self.normaliser

    def _gradient(self, x: Tensor, noise: Noise, batch: Batch, n: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            loss = self.loss(x, noise, batch, n)
            grad = _grad(loss, x)
        return grad, loss.detach()

    def _surprise(self, y: Tensor, noise: Noise, batch: Batch, n: Tensor, x: Tensor) -> Tensor:
        """Minus log q at y of the draw at x: in mean its Hessian in y, where y is x, is the Fisher information."""
        theta, phi = self.program.split(x)
        terms = self.particles(theta, phi, self.program.split(y)[1], noise, batch)
        log_q: Tensor = self.program.unit_scale * terms.log_q.sum(-1).mean() / self.normaliser
        return -log_q

    def _flat(self, name: str, batch: Batch) -> Callable[..., Any]:
        """The named method over flat tensors, the parts of noise and batch among them."""
        method, parts, rows = getattr(self, name), len(batch.args), batch.indices is not None

        def flat(x: Tensor, normal: Tensor, uniform: Tensor, *rest: Tensor) -> Any:
            args, rest = tuple(rest[:parts]), rest[parts:]
            indices, rest = (rest[0], rest[1:]) if rows else (None, rest)
            return method(x, Noise(normal, uniform), Batch(args, indices), *rest)

        return flat

    def function(self, name: str, x: Tensor, noise: Noise, batch: Batch, *more: Tensor) -> Callable[..., Any]:
        """The named method over flat tensors; traced from the given shapes at the first call."""
        if name not in self._graphs:
            flat = self._flat(name, batch)
            if self.traced:
                graph = simplified(flat, *_flatten(x, noise, batch, *more))
                self._graphs[name], self._widths[name] = graph, widest(graph)
            else:
                self._graphs[name] = flat
        return self._graphs[name]

    # ---- many evaluations ----

    def compile_gradients(self, evaluations: float) -> None:
        """Compile what :meth:`gradients` runs at one point, where about so many evaluations repay it."""
        n = torch.full((), math.inf, dtype=self.program.dtype, device=self.program.device)
        feed = Stream(self.program, 0, "compile", self.objective.draws).once(0, 1)
        noise, batch = feed.noise.at(0), feed.batch(self.program, 0)
        inputs = _flatten(self.program.initial(), noise, batch, n)
        graph = self.function("_gradient", inputs[0], noise, batch, n)
        if isinstance(graph, GraphModule):
            self._compiled = compiled_where_it_pays(graph, inputs, self._flags(feed, batch, False), evaluations)

    @property
    def compiled(self) -> bool:
        """Whether :meth:`compile_gradients` compiled them."""
        return self._compiled is not None

    def _map(self, name: str, x: Tensor, feed: Feed, step: float) -> Any:
        """Map a method over the J evaluations of a feed, in pieces, at one ``x`` or one for each."""
        n = torch.full((), step, dtype=x.dtype, device=x.device)
        count, many = len(feed.noise.normal), x.dim() == 2
        first = feed.batch(self.program, 0)
        function = self.function(name, x[0] if many else x, feed.noise.at(0), first, n)
        flags = self._flags(feed, first, many)

        def flat(part: slice) -> list[Tensor]:
            at = x[part] if many else x
            return _flatten(at, feed.noise.at(part), feed.batch(self.program, part), n)

        if name == "_gradient" and not many and self._compiled is not None:
            return self._compiled(*flat(slice(count)))
        if self.vectorise and count > 1:
            lanes, mapped, parts = self._lanes(name, count), over_draws(function, flags, vectorise=True), []
            try:
                for inputs, used in _in_lanes(flat, flags, count, lanes):
                    graph = self._graph((name, *flags), mapped, inputs)
                    with torch.no_grad():
                        made = graph(*inputs)
                    parts.append(tree_map(lambda t, used=used: t[:used], made))
                return _joined(parts)
            except RuntimeError:  # an operation that vmap cannot map
                self.vectorise = False
        with nullcontext() if self.traced else self.program.networks_kept():
            return over_draws(function, flags, vectorise=False)(*flat(slice(count)))

    @staticmethod
    def _flags(feed: Feed, batch: Batch, many: bool) -> list[bool]:
        """Which of the inputs of a flat method, n the last, differ between the evaluations of a feed."""
        rows = [True] * (batch.indices is not None)
        return [many, True, True, *(feed.moving for _ in batch.args), *rows, False]

    def _lanes(self, name: str, count: int, vectors: int = 1) -> int:
        """Evaluations in one call of a mapped graph, by the widest array in one of them."""
        numbers = self._widths[name] * vectors
        worth = max((size for size in LANES if size * numbers <= WORTH), default=LANES[0])
        return min(_fitting(LANES, count), worth, max(1, CHUNK // numbers))

    def _graph(
        self, key: tuple[Any, ...], function: Callable[..., Any], inputs: Sequence[Tensor]
    ) -> Callable[..., Any]:
        """``function`` as a graph for such inputs, traced when first asked for."""
        key = (*key, *(t.shape for t in inputs))
        if key not in self._graphs:
            self._graphs[key] = simplified(function, *inputs)
        return self._graphs[key]

    def gradients(self, x: Tensor, feed: Feed, *, step: float = math.inf) -> tuple[Tensor, Tensor]:
        """J independent gradients ``(J, P)`` and losses ``(J,)`` at ``x``; schedules as at ``step``, or at the end.

        ``x`` is one point ``(P,)``, or a point for each evaluation ``(J, P)``.
        """
        grads, losses = self._map("_gradient", x, feed, step)
        return grads, losses

    def losses(self, x: Tensor, feed: Feed, *, step: float = math.inf) -> Tensor:
        """Losses ``(J,)``, no gradient."""
        with torch.no_grad():
            losses: Tensor = self._map("loss", x, feed, step)
        return losses

    def hessian_products(self, x: Tensor, vectors: Tensor, feed: Feed) -> Tensor:
        """Mean Hessian of the loss over the feed, times each row of ``vectors`` ``(R, P)``."""
        return self._mean_products("loss", x, vectors, feed)

    def fisher_products(self, x: Tensor, vectors: Tensor, feed: Feed) -> Tensor:
        """Mean Fisher information of q (per ``normaliser``), times each row of ``vectors``; needs a split objective."""
        return self._mean_products("_surprise", x, vectors, feed, x.detach())

    def _mean_products(self, name: str, x: Tensor, vectors: Tensor, feed: Feed, *held: Tensor) -> Tensor:
        """Hessian in ``x`` of the named method's mean over the feed, times each row of ``vectors``.

        The mean is taken before its derivative, so that no array of the size of the parameters is held for each
        evaluation. Where those can be mapped, so are the vectors; what fills the last lanes weighs nothing.
        """
        n = torch.full((), math.inf, dtype=x.dtype, device=x.device)
        count, first = len(feed.noise.normal), feed.batch(self.program, 0)
        rows, lanes = 1 if self.traced else len(vectors), 1
        if self.vectorise:
            self.function("loss", x, feed.noise.at(0), first, n)  # tells how wide one is
            rows = _fitting(VECTORS, len(vectors))
            lanes = self._lanes("loss", count, rows)
        flags = [*self._flags(feed, first, False), *(False for _ in held)]
        products = _products_of(self._flat(name, first), flags, vectorise=self.vectorise)
        found = torch.zeros_like(vectors)

        def flat(part: slice) -> list[Tensor]:
            return [*_flatten(x, feed.noise.at(part), feed.batch(self.program, part), n), *held]

        try:
            for inputs, used in _in_lanes(flat, flags, count, lanes):
                weights = (torch.arange(lanes, device=x.device) < used).to(x.dtype) / count
                run = self._run_of(("products", name, *flags), products, [*inputs, weights])
                for row in range(0, len(vectors), rows):
                    piece = vectors[row : row + rows]
                    found[row : row + rows] += run(filled(piece, rows - len(piece)))[: len(piece)]
        except RuntimeError:
            if not self.vectorise:
                raise
            self.vectorise = False  # an operation that vmap cannot map
            return self._mean_products(name, x, vectors, feed, *held)
        return found

    def _run_of(
        self, key: tuple[Any, ...], products: Callable[..., Tensor], inputs: list[Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """Vectors to their products at given inputs: by handlers all in one run, by graphs mapped or one by one."""

        def by_handlers(vectors: Tensor) -> Tensor:
            with self.program.networks_kept():
                return products(*inputs, vectors)

        def by_graph(vectors: Tensor) -> Tensor:
            graph, given = self._graph(key, products, [*inputs, vectors[:1]]), vectors
            if len(vectors) > 1:
                given = vectors.unsqueeze(1)
                mapped = over_draws(graph, [*(False for _ in inputs), True], vectorise=True)
                graph = self._graph(key, mapped, [*inputs, given])
            with torch.no_grad():
                return graph(*inputs, given).reshape(vectors.shape)  # type: ignore[no-any-return]

        return by_graph if self.traced else by_handlers

    def on(self, program: Program) -> Calculus:
        """The same functions on other data, ``program.with_data(...)``; new graphs where more than rows differ."""
        if not self.program.differs_in_rows_only(program):
            log_weights = TracedLogWeights(program) if self.traced else program.log_weights
            return Calculus(program, self.objective, log_weights, self.normaliser)
        other = copy.copy(self)
        other.program = program
        return other


def _grad(y: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(y, x, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


def _products_of(scalar: Callable[..., Tensor], flags: Sequence[bool], *, vectorise: bool) -> Callable[..., Tensor]:
    """A function of the inputs of several evaluations of ``scalar``, their weights ``(J,)``, and vectors ``(R, P)``.

    It gives the Hessian in the first input of the weighted sum, times each of the vectors.
    """

    def products(x: Tensor, *rest: Tensor) -> Tensor:
        *inputs, weights, vectors = rest
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            values = over_draws(scalar, flags, vectorise=vectorise)(x, *inputs)
            grad = _grad((weights * values).sum(), x, create_graph=True)
            if not grad.requires_grad:
                return torch.zeros_like(vectors)

            rows = [torch.autograd.grad(grad @ v, x, retain_graph=True, allow_unused=True)[0] for v in vectors]
            return torch.stack([torch.zeros_like(x) if row is None else row for row in rows])

    return products


def _in_lanes(
    flat: Callable[[slice], list[Tensor]], flags: Sequence[bool], count: int, lanes: int
) -> Iterator[tuple[list[Tensor], int]]:
    """Inputs of so many evaluations at a time, and how many of them are wanted: copies of the last fill the rest."""
    for start in range(0, count, lanes):
        inputs, used = flat(slice(start, min(start + lanes, count))), min(lanes, count - start)
        yield [filled(t, lanes - used) if mapped else t for t, mapped in zip(inputs, flags, strict=True)], used


def _fitting(sizes: Sequence[int], count: int) -> int:
    """The smallest of the sizes that holds so many, or the largest."""
    return next((size for size in sizes if size >= count), sizes[-1])


def _joined(results: list[Any]) -> Any:
    """Parts of a result, or of each of a tuple, one after the other."""
    return tree_map(lambda *parts: torch.cat(parts), *results)


def _flatten(x: Tensor, noise: Noise, batch: Batch, *more: Tensor) -> list[Tensor]:
    indices = [] if batch.indices is None else [batch.indices]
    return [x, *noise, *batch.args, *indices, *more]


__all__ = ["Calculus", "LogWeights", "Untraceable"]
