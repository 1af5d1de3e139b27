"""The engine that runs whole chunks of steps in compiled code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from bbvi_conv.engine.engine import Carry, TracedEngine
from bbvi_conv.engine.native import NativeLoop
from bbvi_conv.engine.streams import Feed, Stream
from bbvi_conv.engine.workers import Workers
from bbvi_conv.program.graphs import NARROW, PRODUCTS, widest

LARGE = 2**15
"""Numbers in the widest tensor of a step from which generated code uses every thread."""

MANY = 8
"""Seeds from which products with a wide matrix that they share repay running side by side."""

_aten: Any = torch.ops.aten

_PRODUCTS = {*PRODUCTS, _aten.mv.default, _aten.addmv.default}


class CompiledEngine:
    """Runs T steps of a traced engine's graph in one call: no Python, no allocation between them.

    Rows of a minibatch are gathered inside the loop from the resident data. Several seeds run side by side, or where
    :func:`in_turn` says so one after another, each a block of steps; where torch has several threads, as many seeds at
    a time, each on one thread.

    Args:
        traced: the engine whose steps these are.
        reason: why this engine.

    Attributes:
        in_turn: whether the seeds run one after another.
        at_once: how many of them at a time.

    Raises:
        CannotCompile, NoCompiler: with the reason.
    """

    name = "compiled"

    def __init__(self, traced: TracedEngine, reason: str) -> None:
        self.calculus, self.num_seeds, self.reason = traced.calculus, traced.num_seeds, reason
        program = self.calculus.program
        self.in_turn = in_turn(traced)
        self.at_once = min(torch.get_num_threads(), self.num_seeds) if self.in_turn else 1
        graph, example, _ = traced.one if self.in_turn else traced.all
        self._gathers = program.minibatch is not None and not program.by_index
        self._loop = NativeLoop(
            graph,
            example,
            traced.carried,
            2 + program.by_index,
            resident=[program.args[i] for i in program.batched] if self._gathers else (),
            threads=1 if self.at_once > 1 else _threads(graph),
        )
        self._free: SimpleQueue[NativeLoop] = SimpleQueue()

    @property
    def cached(self) -> bool:
        """Whether :meth:`prepare` will not take long."""
        return self._loop.cached

    def prepare(self) -> bool:
        """Compile, or load what an earlier process compiled; whether it was made now."""
        made = self._loop.load()
        for loop in (self._loop, *(self._loop.twin() for _ in range(self.at_once - 1))):
            self._free.put(loop)
        if self.at_once > 1:
            self._workers = Workers(self.at_once)
        return made

    def advance(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Run the loop once per block of noise, or once per block and seed."""
        losses = []
        for feed in stream.steps(start, count):
            if self.in_turn:
                carry, loss = self._seeds(carry, feed)
            else:
                carry, loss = self._run(carry, feed)
            losses.append(loss)
        return carry, torch.cat(losses) if losses else carry.x.new_zeros(0, *carry.step.shape)

    def _seeds(self, carry: Carry, feed: Feed) -> tuple[Carry, Tensor]:
        """All seeds over a block; where they do not share out evenly among the threads, in parts of it."""
        parts = self.at_once if self.num_seeds % self.at_once else 1
        runs = [self._parts(own, feed.of_seed(s).split(parts)) for s, own in enumerate(carry.unstack())]
        made = self._workers.exhaust(runs) if self.at_once > 1 else [list(run) for run in runs]
        carries = [ran[-1][0] for ran in made]
        return Carry.stack(carries), torch.stack([torch.cat([loss for _, loss in ran]) for ran in made], 1)

    def _parts(self, carry: Carry, feeds: Sequence[Feed]) -> Iterator[tuple[Carry, Tensor]]:
        for feed in feeds:
            carry, loss = self._run(carry, feed)
            yield carry, loss

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


def in_turn(traced: TracedEngine) -> bool:
    """Whether several seeds run faster one after another than side by side.

    Side by side, operations on single numbers fill vectors, and a product with a wide matrix of data that all seeds
    share becomes one product for all. Products of matrices of a seed's own, and with narrow data, gain nothing: one
    after another they stay small enough to be written out into the kernel, or find their operands still in the cache.
    """
    if traced.num_seeds == 1:
        return False
    products = [node for node in traced.one.graph.graph.nodes if node.target in _PRODUCTS]
    if not products:
        return not traced.all.vectorised
    shared = [
        given.meta["tensor_meta"].shape for p in products for given in p.all_input_nodes if given.op == "get_attr"
    ]
    return traced.num_seeds < MANY or all(shape[-1] <= NARROW for shape in shared)


def _threads(graph: GraphModule) -> int:
    return torch.get_num_threads() if widest(graph) >= LARGE else 1
