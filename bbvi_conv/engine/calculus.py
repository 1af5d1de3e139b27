"""Losses, gradients and curvature products of (program, objective) at given parameters, noise and rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bbvi_conv.engine.streams import Feed
from bbvi_conv.objectives.objective import Objective
from bbvi_conv.program.buffers import buffers_kept
from bbvi_conv.program.graphs import simplify
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.program import Program
from bbvi_conv.program.terms import Terms
from bbvi_conv.program.trace import LogWeights, TracedLogWeights, Untraceable, over_draws, to_graph

CHUNK = 20_000_000
"""Numbers a vectorised evaluation may hold per parameter-sized array."""


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
        self.vectorise = self.traced and self._vmaps()
        self.particles = over_draws(log_weights, (False, False, False, True, False), vectorise=self._many)
        self._graphs: dict[str, Callable[..., Any]] = {}

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

    def _vmaps(self) -> bool:
        theta, phi = self.program.split(self.program.initial())
        noise, batch = self.program.example()
        two = Noise(*(torch.stack([part, part]) for part in noise))
        density = dict(phi) if self.objective.split else phi
        try:
            over_draws(self.log_weights, (False, False, False, True, False), vectorise=True)(
                theta, phi, density, two, batch
            )
        except Exception:  # whatever vmap cannot do, a loop can
            return False
        return True

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

    def _hessian_products(self, x: Tensor, noise: Noise, batch: Batch, n: Tensor, vectors: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return _products(self.loss(x, noise, batch, n), x, vectors)

    def _fisher_products(self, x: Tensor, noise: Noise, batch: Batch, n: Tensor, vectors: Tensor) -> Tensor:
        """Minus the Hessian of log q in the density's parameters at the fixed draw: in mean, the Fisher information."""
        theta, phi = self.program.split(x.detach())
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            terms = self.particles(theta, phi, self.program.split(y)[1], noise, batch)
            log_q = self.program.unit_scale * terms.log_q.sum(-1).mean() / self.normaliser
            return _products(-log_q, y, vectors)

    def function(self, name: str, x: Tensor, noise: Noise, batch: Batch, *more: Tensor) -> Callable[..., Any]:
        """The named method over flat tensors; traced from the given shapes at the first call."""
        if name not in self._graphs:
            method, parts = getattr(self, name), len(batch.args)
            rows = batch.indices is not None

            def flat(x: Tensor, normal: Tensor, uniform: Tensor, *rest: Tensor) -> Any:
                args, rest = tuple(rest[:parts]), rest[parts:]
                indices, rest = (rest[0], rest[1:]) if rows else (None, rest)
                return method(x, Noise(normal, uniform), Batch(args, indices), *rest)

            if self.traced:
                self._graphs[name] = simplify(to_graph(flat, *_flatten(x, noise, batch, *more), functional=False))
            else:
                self._graphs[name] = flat
        return self._graphs[name]

    # ---- many evaluations ----

    def _map(self, name: str, x: Tensor, feed: Feed, step: float, *more: Tensor) -> Any:
        """Map a method over the J evaluations of a feed, in pieces that fit in memory, at one ``x`` or one for each."""
        more = (torch.full((), step, dtype=x.dtype, device=x.device), *more)
        count, many = len(feed.noise.normal), x.dim() == 2
        first = feed.batch(self.program, 0)
        widest = max(x.shape[-1], sum(self.program.layout), *(a.numel() for a in first.args), 1)
        piece = max(1, min(count, CHUNK // (widest * self.runs)))
        function = self.function(name, x[0] if many else x, feed.noise.at(0), first, *more)
        results = []
        with buffers_kept(() if self.traced else self.program.modules):
            for start in range(0, count, piece):
                part = slice(start, start + piece)
                batch = feed.batch(self.program, part)
                flags = [many, True, True, *(feed.moving for _ in batch.args)]
                flags += [True] * (batch.indices is not None) + [False] * len(more)
                at = x[part] if many else x
                results.append(self._over_draws(function, flags, _flatten(at, feed.noise.at(part), batch, *more)))
        if isinstance(results[0], tuple):
            return tuple(torch.cat(column) for column in zip(*results, strict=True))
        return torch.cat(results)

    def _over_draws(self, function: Callable[..., Any], mapped: list[bool], flat: list[Tensor]) -> Any:
        """Vectorised; from the first operation on that ``vmap`` cannot map, by a loop."""
        if self.vectorise:
            try:
                return over_draws(function, mapped, vectorise=True)(*flat)
            except RuntimeError:
                self.vectorise = False
        return over_draws(function, mapped, vectorise=False)(*flat)

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
        return self._mean_products("_hessian_products", x, vectors, feed)

    def fisher_products(self, x: Tensor, vectors: Tensor, feed: Feed) -> Tensor:
        """Mean Fisher information of q (per ``normaliser``), times each row of ``vectors``; needs a split objective."""
        return self._mean_products("_fisher_products", x, vectors, feed)

    def _mean_products(self, name: str, x: Tensor, vectors: Tensor, feed: Feed) -> Tensor:
        """A graph takes one vector at a time, over all draws at once; handlers run once per draw, for all vectors."""
        pieces = torch.split(vectors, 1) if self.traced else (vectors,)
        return torch.cat([self._map(name, x, feed, math.inf, piece).mean(0) for piece in pieces])

    def on(self, program: Program) -> Calculus:
        """The same functions on other data: ``program.with_data(...)``."""
        other = copy.copy(self)
        other.program = program
        return other


def _grad(y: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(y, x, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


def _products(y: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """Hessian of y in x, times each row of ``vectors``."""
    grad = _grad(y, x, create_graph=True)
    if not grad.requires_grad:
        return torch.zeros_like(vectors)
    rows = [torch.autograd.grad(grad @ v, x, retain_graph=True, allow_unused=True)[0] for v in vectors]
    return torch.stack([torch.zeros_like(x) if row is None else row for row in rows])


def _flatten(x: Tensor, noise: Noise, batch: Batch, *more: Tensor) -> list[Tensor]:
    indices = [] if batch.indices is None else [batch.indices]
    return [x, *noise, *batch.args, *indices, *more]


__all__ = ["Calculus", "LogWeights", "Untraceable"]
