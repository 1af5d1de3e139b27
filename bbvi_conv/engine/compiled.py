"""The engine that runs whole chunks of steps in compiled code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from bbvi_conv.engine.engine import Carry, TracedEngine
from bbvi_conv.engine.native import NativeLoop
from bbvi_conv.engine.streams import Stream
from bbvi_conv.program.graphs import widest

LARGE = 2**15
"""Numbers in the widest tensor of a step from which generated code uses every thread."""


class CompiledEngine:
    """Runs T steps of a traced engine's graph in one call: no Python, no allocation between them.

    Rows of a minibatch are gathered inside the loop from the resident data.

    Args:
        traced: the engine whose steps these are.
        reason: why this engine.

    Raises:
        CannotCompile, NoCompiler: with the reason.
    """

    name = "compiled"

    def __init__(self, traced: TracedEngine, reason: str) -> None:
        self.calculus, self.num_seeds, self.reason = traced.calculus, traced.num_seeds, reason
        program = self.calculus.program
        self._gathers = program.minibatch is not None and not program.by_index
        self._loop = NativeLoop(
            traced.graph,
            traced.example,
            traced.carried,
            2 + program.by_index,
            resident=[program.args[i] for i in program.batched] if self._gathers else (),
            threads=_threads(traced.graph),
        )

    @property
    def cached(self) -> bool:
        """Whether :meth:`prepare` will not take long."""
        return self._loop.cached

    def prepare(self) -> bool:
        """Compile, or load what an earlier process compiled; whether it was made now."""
        return self._loop.load()

    def advance(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Run the loop once per block of noise."""
        flat, losses = carry.flat(), []
        for feed in stream.steps(start, count):
            steps = len(feed.noise.normal)
            if self._gathers:
                flat, (loss,) = self._loop(flat, feed.noise, steps, feed.rows)
            else:
                moving = [*feed.noise, *([] if feed.rows is None else [feed.rows])]
                flat, (loss,) = self._loop(flat, moving, steps)
            losses.append(loss)
        empty = carry.x.new_zeros(0, *carry.step.shape)
        return Carry.unflatten(flat), torch.cat(losses) if losses else empty


def _threads(graph: GraphModule) -> int:
    return torch.get_num_threads() if widest(graph) >= LARGE else 1
