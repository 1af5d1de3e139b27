"""Many evaluations of one graph by compiled code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from bbvi_conv.engine.native import CannotCompile, NativeLoop, NoCompiler
from bbvi_conv.engine.workers import Workers
from bbvi_conv.program.aten_graph import Untraceable
from bbvi_conv.program.graphs import CONVOLUTIONS, reordered, widths
from bbvi_conv.program.trace import over_draws, simplified

REPAYS = 5_000_000_000
"""Numbers that all evaluations together compute, from which convolutions are compiled. Each costs 0.4 ns less on two
threads of an AMD EPYC, 0.7 on one: 2 to 3.5 s, for 5 to 12 s of compiling that later calls and runs find done."""


class CompiledMap:
    """What ``over_draws(graph, mapped, vectorise=True)`` gives, in compiled code; with several threads a part by each.

    Args:
        graph: plain operations; gives a tuple of tensors.
        example: its inputs.
        mapped: which of them have the evaluations in front when it is called; the others are the same for all.
        lanes: evaluations that are one operation of the code, so that what they share is computed once for all.

    Raises:
        CannotCompile, NoCompiler, Untraceable: with the reason.
    """

    def __init__(self, graph: GraphModule, example: Sequence[Tensor], mapped: Sequence[bool], *, lanes: int = 1):
        self.mapped, self.lanes = tuple(mapped), lanes
        if lanes > 1:
            example = [torch.stack([t] * lanes) if m else t for t, m in zip(example, mapped, strict=True)]
            graph = simplified(over_draws(graph, mapped, vectorise=True), *example)
        moving = sum(mapped)
        order = sorted(range(len(mapped)), key=self.mapped.__getitem__)
        held = len(mapped) - moving
        loop = NativeLoop(reordered(graph, order), [example[i] for i in order], 0, moving, held=held)
        loop.load()
        at_once = torch.get_num_threads()
        self._loops = [loop, *(loop.twin() for _ in range(at_once - 1))]
        self._workers = Workers(at_once) if at_once > 1 else None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Each result with the evaluations in front."""
        held = [t for t, m in zip(inputs, self.mapped, strict=True) if not m]
        moving = [t for t, m in zip(inputs, self.mapped, strict=True) if m]
        count = len(moving[0])
        if self.lanes > 1:
            moving = [torch.stack(torch.split(filled(t, -count % self.lanes), self.lanes)) for t in moving]
        steps = len(moving[0])
        size = -(-steps // len(self._loops))
        parts = [[t[begin : begin + size] for t in moving] for begin in range(0, steps, size)]
        runs = [_run(loop, held, part) for loop, part in zip(self._loops, parts, strict=False)]
        found = [list(run) for run in runs] if self._workers is None else self._workers.exhaust(runs)
        results = [
            pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            for pieces in zip(*(made for (made,) in found), strict=True)
        ]
        return tuple(r.flatten(0, 1)[:count] if self.lanes > 1 else r for r in results)


def _run(loop: NativeLoop, held: Sequence[Tensor], moving: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    _, made = loop(held, moving, len(moving[0]))
    yield made


def filled(tensor: Tensor, missing: int) -> Tensor:
    """With its last row repeated so many times."""
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor


def compiled_where_it_pays(
    graph: GraphModule, example: Sequence[Tensor], mapped: Sequence[bool], evaluations: float, *, lanes: int = 1
) -> CompiledMap | None:
    """The graph compiled, or None: so many evaluations do not repay it, or it cannot be done.

    Products of matrices gain little over torch's own operations, convolutions and what lies between them much.
    """
    convolves = any(node.target in CONVOLUTIONS for node in graph.graph.nodes)
    on_cpu = all(t.device.type == "cpu" for t in example)
    if not (convolves and on_cpu and evaluations * sum(widths(graph)) >= REPAYS):
        return None
    try:
        return CompiledMap(graph, example, mapped, lanes=lanes)
    except (CannotCompile, NoCompiler, Untraceable):
        return None
