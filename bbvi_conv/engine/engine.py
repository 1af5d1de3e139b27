"""One optimiser step as a pure function of tensors, and two engines that run many of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bbvi_conv.engine.calculus import Calculus
from bbvi_conv.engine.streams import Stream
from bbvi_conv.optim import Average, Optimiser, empty_average, include
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.trace import to_graph


class Carry(NamedTuple):
    """State between steps: iterate ``x`` ``(P,)``, optimiser ``state``, window ``average``, ``step``, first ``bad`` step.

    ``bad`` is -1 while everything is finite; from the first non-finite loss or gradient on, the carry is frozen.
    """

    x: Tensor
    state: tuple[Tensor, ...]
    average: Average
    step: Tensor
    bad: Tensor

    def flat(self) -> list[Tensor]:
        """Tensors in a fixed order."""
        return [self.x, *self.state, *self.average, self.step, self.bad]

    @staticmethod
    def unflatten(flat: list[Tensor]) -> Carry:
        """The inverse of :meth:`flat`."""
        x, *state, mean, count, step, bad = flat
        return Carry(x, tuple(state), Average(mean, count), step, bad)


def start_carry(optimiser: Optimiser, x: Tensor) -> Carry:
    """The carry before the first step."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return Carry(x, optimiser.init(x), empty_average(x), zero, zero - 1)


class Engine(Protocol):
    """Runs steps; ``name`` and ``reason`` say which engine and why."""

    name: str
    reason: str
    calculus: Calculus

    def advance(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Run the steps ``start .. start + count - 1``; returns the carry and the losses ``(count,)``."""
        ...


def step(calculus: Calculus, optimiser: Optimiser, carry: Carry, noise: Noise, batch: Batch) -> tuple[Carry, Tensor]:
    """One step; a non-finite loss or gradient leaves the carry as it was but for ``bad``."""
    n = carry.step + 1
    grad, loss = calculus._gradient(carry.x, noise, batch, n)
    with torch.no_grad():
        x, state = optimiser.update(grad, carry.state, carry.x, n)
        moved = Carry(x, state, include(carry.average, x), n, carry.bad)
        fine = torch.isfinite(loss) & torch.isfinite(grad.sum()) & (carry.bad < 0)
        kept = [torch.where(fine, new, old) for new, old in zip(moved.flat(), carry.flat(), strict=True)]
        kept[-1] = torch.where(fine | (carry.bad >= 0), carry.bad, carry.step)
        return Carry.unflatten(kept), loss


class EagerEngine:
    """Runs Pyro's handlers at every step: any program, value-dependent control flow included."""

    name = "eager"

    def __init__(self, calculus: Calculus, optimiser: Optimiser, reason: str) -> None:
        self.calculus, self.optimiser, self.reason = calculus, optimiser, reason

    def advance(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Run steps one after the other."""

        def one(carry: Carry, noise: Noise, batch: Batch) -> tuple[Carry, Tensor]:
            return step(self.calculus, self.optimiser, carry, noise, batch)

        return _loop(one, self.calculus, carry, stream, start, count)


class TracedEngine:
    """Runs one graph of plain operations per step: gradient, optimiser and average included."""

    name = "traced"

    def __init__(self, calculus: Calculus, optimiser: Optimiser, reason: str) -> None:
        self.calculus, self.optimiser, self.reason = calculus, optimiser, reason
        program = calculus.program
        example = start_carry(optimiser, program.initial())
        noise, batch = program.example()
        draws = Noise(*(part.expand(calculus.objective.draws, -1).clone() for part in noise))
        self._size, self._parts = len(example.flat()), len(batch.args)
        rows = [] if batch.indices is None else [batch.indices]
        self._graph = to_graph(self._flat, *example.flat(), *draws, *batch.args, *rows, functional=False)

    def _flat(self, *flat: Tensor) -> tuple[Tensor, ...]:
        carry, rest = Carry.unflatten(list(flat[: self._size])), flat[self._size :]
        args, rows = rest[2 : 2 + self._parts], rest[2 + self._parts :]
        batch = Batch(tuple(args), rows[0] if rows else None)
        carry, loss = step(self.calculus, self.optimiser, carry, Noise(rest[0], rest[1]), batch)
        return (*carry.flat(), loss)

    def advance(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Run the graph once per step."""

        def one(carry: Carry, noise: Noise, batch: Batch) -> tuple[Carry, Tensor]:
            rows = [] if batch.indices is None else [batch.indices]
            *flat, loss = self._graph(*carry.flat(), *noise, *batch.args, *rows)
            return Carry.unflatten(flat), loss

        with torch.no_grad():
            return _loop(one, self.calculus, carry, stream, start, count)


def _loop(
    one: Callable[[Carry, Noise, Batch], tuple[Carry, Tensor]],
    calculus: Calculus,
    carry: Carry,
    stream: Stream,
    start: int,
    count: int,
) -> tuple[Carry, Tensor]:
    losses = []
    for feed in stream.steps(start, count):
        for t in range(len(feed.noise.normal)):
            carry, loss = one(carry, feed.noise.at(t), feed.batch(calculus.program, t))
            losses.append(loss)
    return carry, torch.stack(losses) if losses else carry.x.new_zeros(0)
