"""The engine that runs whole chunks of steps in compiled code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bbvi_conv.engine.engine import Carry, TracedEngine, start_carry
from bbvi_conv.engine.native import CannotCompile, NativeLoop, StoppedEarly
from bbvi_conv.engine.streams import Feed, Stream
from bbvi_conv.engine.workers import Workers, one_thread
from bbvi_conv.program.graphs import NARROW, PRODUCTS, widest
from bbvi_conv.program.program import Program

LARGE = 2**15
"""Numbers in the widest tensor of a step from which generated code uses every thread."""

MANY = 8
"""Seeds from which products with a wide matrix that they share repay running side by side."""

FILLING = 16
"""Seeds that fill a vector of the widest kind."""

_aten: Any = torch.ops.aten

_PRODUCTS = {*PRODUCTS, _aten.mv.default, _aten.addmv.default}
_SHAPES = {_aten.t.default, _aten.permute.default, _aten.transpose.int, _aten.view.default}


class CompiledEngine:
    """Runs T steps of a traced engine's graph in one call: no Python, no allocation between them.

    Whether losses and gradients are finite is not looked at in the loop, where it would take as long as reading the
    gradient once more: NaN and infinity stay, so that the end of the loop tells. Rows of a minibatch are gathered
    inside the loop from the resident data. Several seeds run side by side, many of them in a group for each thread; or
    where :func:`in_turn` says so one after another, each a block of steps, and as many at a time as torch has threads.

    Args:
        traced: the engine whose steps these are.
        reason: why this engine.

    Attributes:
        in_turn: whether the seeds run one after another.
        at_once: how many of them, or how many groups of them, at a time, each on a thread of its own.

    Raises:
        CannotCompile, NoCompiler: with the reason.
    """

    name = "compiled"

    def __init__(self, traced: TracedEngine, reason: str) -> None:
        self.calculus, self.num_seeds, self.reason = traced.calculus, traced.num_seeds, reason
        program = self.calculus.program
        self.in_turn = in_turn(traced)
        threads = torch.get_num_threads()
        self.at_once = min(threads, self.num_seeds) if self.in_turn else _groups(self.num_seeds, threads)
        self._group = 1 if self.in_turn else self.num_seeds // self.at_once
        self._traced = traced
        graph, example, _ = traced.side_by_side(self._group, checked=False)
        self._gathers = program.minibatch is not None and not program.by_index
        self._loop = NativeLoop(
            graph,
            example,
            traced.carried,
            2 + program.by_index,
            resident=[program.args[i] for i in program.batched] if self._gathers else (),
            threads=1 if self.at_once > 1 else _threads(graph),
            checked=program.minibatch is not None,  # what is picked by all the data is seen before, by its rows not
        )

    @property
    def cached(self) -> bool:
        """Whether :meth:`prepare` will not take long."""
        return self._loop.cached

    def lost(self, seconds: float) -> float:
        """Note what a run loses by other steps than these; what all such runs have lost since the cache was made."""
        return self._loop.lost(seconds)

    def prepare(self) -> bool:
        """Compile, or load what an earlier process compiled; whether it was made now.

        Raises:
            CannotCompile, NoCompiler: with the reason; code that gives another step than the traced engine.
        """
        made = self._loop.load()
        self._free: SimpleQueue[NativeLoop] = SimpleQueue()
        for loop in (self._loop, *(self._loop.twin() for _ in range(self.at_once - 1))):
            self._free.put(loop)
        if self.at_once > 1:
            self._workers = Workers(self.at_once)
        self._check()
        return made

    def _check(self) -> None:
        """Compare a first step with the traced engine's: its losses, and what the optimiser remembers of gradients.

        Where it remembers nothing the moves are compared. They may differ by far more than roundings, for a gradient
        may be the small difference of large numbers; but no parameter's by as much as wrong code makes of it.
        """
        program, traced = self.calculus.program, self._traced
        start = start_carry(traced.optimiser, program.initial())
        carry = Carry.stack([start] * self._group)
        feed = next(Stream(program, 0, "compile", self.calculus.objective.draws, num_seeds=self._group).steps(0, 1))
        try:
            found, (loss,) = self._run(carry, feed)
        except StoppedEarly:  # the run will say at which index
            return
        with torch.no_grad():
            graph = traced.side_by_side(self._group, checked=False)
            right, right_loss = graph.step(carry, feed.noise.at(0), feed.batch(program, 0))
        tolerance = 0.2 if traced.amp else 1e-2 if program.dtype is torch.float32 else 1e-5
        wrong = [] if torch.allclose(loss, right_loss, tolerance, tolerance, equal_nan=True) else ["the loss"]
        for a, b in zip(found.unstack(), right.unstack(), strict=True):
            if bool(torch.isfinite(b.x).all()):
                wrong += _differing(program, _moves(a, start), _moves(b, start), tolerance)
        if wrong:
            raise CannotCompile(f"compiled code does not give the step of the traced engine ({wrong[0]})")

    def advance(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Run the steps unchecked; where their end is not finite, the traced engine goes through them again.

        So it does where one stops at an index that is out of range: it says which.
        """
        with one_thread() if self.at_once > 1 else nullcontext():
            try:
                moved = self._unchecked(carry, stream, start, count)
            except StoppedEarly:
                return self._traced.advance(carry, stream, start, count)
            return self._traced.finite_or_again(moved, carry, stream, start, count)

    def _unchecked(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Run the loop once per block of noise; where seeds are not all side by side, for each of them or each group.

        Where these do not share out evenly among threads, a block is run in parts.
        """
        if not count:
            return carry, carry.x.new_zeros(0, *carry.step.shape)
        if self._group == self.num_seeds:
            ends = [carry]
            losses = list(self._advance(ends, 0, stream.steps(start, count)))
            return ends[0], torch.cat(losses)
        places = self._places()
        parts = self.at_once if len(places) % self.at_once else 1
        ends = [carry.of_seeds(at) for at in places]
        runs = [self._advance(ends, i, stream.of_seeds(at).steps(start, count), parts) for i, at in enumerate(places)]
        losses = [torch.cat(ran) for ran in (self._workers.exhaust(runs) if self.at_once > 1 else map(list, runs))]
        if self.in_turn:
            return Carry.stack(ends), torch.stack(losses, 1)
        return Carry.cat(ends), torch.cat(losses, 1)

    def _places(self) -> Sequence[int | slice]:
        """The seeds of each call: one, or those of a group."""
        if self.in_turn:
            return range(self.num_seeds)
        return [slice(begin, begin + self._group) for begin in range(0, self.num_seeds, self._group)]

    def _advance(self, ends: list[Carry], number: int, feeds: Iterator[Feed], parts: int = 1) -> Iterator[Tensor]:
        """The losses, block after block; meanwhile ``ends[number]`` is the carry they start from."""
        for feed in feeds:
            for part in feed.split(parts):
                ends[number], loss = self._run(ends[number], part)
                yield loss

    def _run(self, carry: Carry, feed: Feed) -> tuple[Carry, Tensor]:
        moving: Sequence[Tensor] = feed.noise
        if not self._gathers and feed.rows is not None:
            moving = [*moving, feed.rows]
        rows = feed.rows if self._gathers else None
        loop = self._free.get()
        try:
            flat, (loss,) = loop(carry.flat(), moving, len(feed.noise.normal), rows)
        finally:
            self._free.put(loop)
        return Carry.unflatten(flat), loss


def _moves(carry: Carry, start: Carry) -> list[Tensor]:
    """What a first step made of the optimiser's memory of gradients; where it has none, of the iterate."""
    memories = [part for part in carry.state if part.shape == carry.x.shape]
    return memories or [carry.x - start.x]


def _differing(program: Program, found: list[Tensor], right: list[Tensor], tolerance: float) -> list[str]:
    """Names of the parameters in which flat vectors differ by that share of their norm, or of a thousandth of all."""
    names = []
    for a, b in zip(found, right, strict=True):
        least = 1e-3 * b.norm()
        parts = [{**theta, **phi} for theta, phi in map(program.split, (a, b))]
        names += [
            name
            for name, part in parts[1].items()
            if not (parts[0][name] - part).norm() <= tolerance * torch.maximum(part.norm(), least)
        ]
    return names


def in_turn(traced: TracedEngine) -> bool:
    """Whether several seeds run faster one after another than side by side.

    Side by side, operations on single numbers fill vectors, and a product with a matrix of data that all seeds share
    becomes one product for all: a wide one is worth it from ``MANY`` seeds on, a narrow one where the seeds fill a
    vector. Products of matrices of a seed's own gain nothing: one after another they find their operands still in the
    cache.
    """
    if traced.num_seeds == 1:
        return False
    products = [node for node in traced.one.graph.graph.nodes if node.target in _PRODUCTS]
    if not products:
        group = traced.num_seeds // _groups(traced.num_seeds, torch.get_num_threads())
        return not traced.side_by_side(group, checked=False).vectorised
    shared = [columns for columns in map(_shared, products) if columns]
    if any(columns > NARROW for columns in shared):
        return traced.num_seeds < MANY
    return len(shared) < len(products) or traced.num_seeds < FILLING


def _shared(product: Node) -> int:
    """Columns of the matrix of data in a product, be it turned there or not; 0 where there is none."""
    for source in product.all_input_nodes:
        node: Any = source
        while node.target in _SHAPES:
            node = node.args[0]
        if node.op == "get_attr" and len(node.meta["tensor_meta"].shape) == 2:
            return int(node.meta["tensor_meta"].shape[-1])
    return 0


def _groups(seeds: int, threads: int) -> int:
    """Groups of equal size that have a thread each: the most that leave seeds enough in one to fill vectors."""
    counts = range(min(threads, seeds // FILLING), 1, -1)
    return next((count for count in counts if seeds % count == 0), 1)


def _threads(graph: GraphModule) -> int:
    return torch.get_num_threads() if widest(graph) >= LARGE else 1
