"""The engine that runs whole chunks of steps in compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from bbvi_conv.engine.engine import Carry, TracedEngine
from bbvi_conv.engine.native import NativeLoop
from bbvi_conv.engine.streams import Feed, Stream
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
    :func:`in_turn` says so one after another, each a block of steps.

    Args:
        traced: the engine whose steps these are.
        reason: why this engine.

    Attributes:
        in_turn: whether the seeds run one after another.

    Raises:
        CannotCompile, NoCompiler: with the reason.
    """

    name = "compiled"

    def __init__(self, traced: TracedEngine, reason: str) -> None:
        self.calculus, self.num_seeds, self.reason = traced.calculus, traced.num_seeds, reason
        program = self.calculus.program
        self.in_turn = in_turn(traced)
        graph, example, _ = traced.one if self.in_turn else traced.all
        self._gathers = program.minibatch is not None and not program.by_index
        self._loop = NativeLoop(
            graph,
            example,
            traced.carried,
            2 + program.by_index,
            resident=[program.args[i] for i in program.batched] if self._gathers else (),
            threads=_threads(graph),
        )

    @property
    def cached(self) -> bool:
        """Whether :meth:`prepare` will not take long."""
        return self._loop.cached

    def prepare(self) -> bool:
        """Compile, or load what an earlier process compiled; whether it was made now."""
        return self._loop.load()

    def advance(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Run the loop once per block of noise, or once per block and seed."""
        losses = []
        for feed in stream.steps(start, count):
            if self.in_turn:
                feeds = [feed.of_seed(s) for s in range(self.num_seeds)]
                runs = [self._run(own, part) for own, part in zip(carry.unstack(), feeds, strict=True)]
                carry, loss = Carry.stack([own for own, _ in runs]), torch.stack([part for _, part in runs], 1)
            else:
                carry, loss = self._run(carry, feed)
            losses.append(loss)
        return carry, torch.cat(losses) if losses else carry.x.new_zeros(0, *carry.step.shape)

    def _run(self, carry: Carry, feed: Feed) -> tuple[Carry, Tensor]:
        moving: Sequence[Tensor] = feed.noise
        if not self._gathers and feed.rows is not None:
            moving = [*moving, feed.rows]
        flat, (loss,) = self._loop(carry.flat(), moving, len(feed.noise.normal), feed.rows if self._gathers else None)
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
