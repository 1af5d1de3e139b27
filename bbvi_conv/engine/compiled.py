"""The engine that runs whole chunks of steps in compiled code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from bbvi_conv.engine.engine import Carry, TracedEngine
from bbvi_conv.engine.native import NativeLoop
from bbvi_conv.engine.streams import Stream

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
        example = traced.example
        carry, seeds = traced.carried, traced.example[0].shape[:-1]
        graph = traced.graph
        if program.minibatch is not None and not program.by_index:
            rows = torch.arange(program.minibatch.size).expand(*seeds, -1)
            resident = [program.args[i] for i in program.batched]
            graph = _gather_inputs(graph, carry + 2, len(resident))
            example = [*example[: carry + 2], rows, *resident]
        self._moves_rows = program.minibatch is not None
        self._loop = NativeLoop(graph, example, carry, 2 + self._moves_rows, threads=_threads(traced.graph))

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
            moving = [*feed.noise, *([feed.rows] if feed.rows is not None else [])]
            flat, (loss,) = self._loop(flat, moving, len(feed.noise.normal))
            losses.append(loss)
        empty = carry.x.new_zeros(0, *carry.step.shape)
        return Carry.unflatten(flat), torch.cat(losses) if losses else empty


def _threads(graph: GraphModule) -> int:
    sizes = [
        n.meta["tensor_meta"].shape.numel() for n in graph.graph.nodes if hasattr(n.meta.get("tensor_meta"), "shape")
    ]
    return torch.get_num_threads() if max(sizes, default=0) >= LARGE else 1


def _gather_inputs(graph: GraphModule, first: int, count: int) -> GraphModule:
    """The graph whose ``count`` inputs from ``first`` on are gathered by row from the whole data.

    Its inputs are those before them, the rows, and the data.
    """
    inner = Graph()
    known: dict[Node, Node] = {}
    given = list(graph.graph.find_nodes(op="placeholder"))
    for node in given[:first]:
        known[node] = inner.node_copy(node)
    rows = inner.placeholder("rows")
    whole = [inner.placeholder(f"whole_{i}") for i in range(count)]
    for node, data in zip(given[first:], whole, strict=True):
        known[node] = inner.call_function(torch.ops.aten.index.Tensor, (data, [rows]))
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            known[node] = inner.node_copy(node, known.__getitem__)
    return GraphModule(graph, inner)
