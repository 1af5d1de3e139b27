"""Steps on a CUDA device without the host between them: a traced step over fixed tensors, captured and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bbvi_conv.engine.engine import Carry, TracedEngine
from bbvi_conv.engine.streams import Feed, Stream

UNROLL = 16
"""Steps in the longer of the two captured graphs; what is left of a chunk is replayed one by one."""


class FixedSteps:
    """One step of a traced engine over fixed tensors: noise and rows of a block are read at a counter on the device.

    Attributes:
        carry: the carry, replaced in place.
        feeds: noise, and rows of a minibatch, of a block of steps, ``(block, ...)``.
        losses: ``(block, ...)``, written at the counter.
        counter: the step within the block, ``()``, on the device.
    """

    def __init__(self, traced: TracedEngine, block: int) -> None:
        program, carried = traced.calculus.program, traced.carried
        self._graph, self._by_index = traced.all.graph, program.by_index
        self.carry = [t.clone() for t in traced.all.example[:carried]]
        step = Carry.unflatten(self.carry).step
        rows = [] if program.minibatch is None else [torch.arange(program.minibatch.size, device=step.device)]
        given = [*traced.all.example[carried : carried + 2], *(r.expand(*step.shape, -1) for r in rows)]
        self.feeds = [t.new_zeros((block, *t.shape)) for t in given]
        self.losses = step.new_zeros((block, *step.shape))
        self.counter = torch.zeros(1, dtype=torch.int64, device=step.device)
        self._whole = [] if program.by_index or not rows else [program.args[i] for i in program.batched]

    def fill(self, carry: Carry, feed: Feed) -> int:
        """Take the carry and a block's noise and rows; the number of steps in it."""
        for old, new in zip(self.carry, carry.flat(), strict=True):
            old.copy_(new)
        given = [*feed.noise, *([] if feed.rows is None else [feed.rows])]
        count = len(given[0])
        for old, new in zip(self.feeds, given, strict=True):
            old[:count].copy_(new)
        self.counter.zero_()
        return count

    def __call__(self) -> None:
        """One step, in place."""
        normal, uniform, *rows = (feed.index_select(0, self.counter)[0] for feed in self.feeds)
        batch = rows if self._by_index else [data[rows[0]] for data in self._whole]
        *moved, loss = self._graph(*self.carry, normal, uniform, *batch)
        for old, new in zip(self.carry, moved, strict=True):
            old.copy_(new)
        self.losses.index_copy_(0, self.counter, loss.unsqueeze(0))
        self.counter += 1


class CudaGraphEngine:
    """Replays captured steps; nothing is copied to the host inside a block.

    Args:
        traced: the engine whose steps these are, on a CUDA device.
        reason: why this engine.

    Raises:
        RuntimeError: what torch says where a step cannot be captured.
    """

    name = "cuda-graph"

    def __init__(self, traced: TracedEngine, reason: str) -> None:
        self.calculus, self.num_seeds, self.reason = traced.calculus, traced.num_seeds, reason
        self._traced = traced
        self._steps: FixedSteps | None = None
        self._replays: dict[int, Callable[[], None]] = {}

    def prepare(self, block: int) -> FixedSteps:
        """Capture; a few steps are run before, as capturing asks."""
        with torch.no_grad():
            steps = FixedSteps(self._traced, block)
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    steps()
                    steps.counter.zero_()
            torch.cuda.current_stream().wait_stream(side)
            for count in (UNROLL, 1):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for _ in range(count):
                        steps()
                self._replays[count] = graph.replay
        self._steps = steps
        return steps

    def advance(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Replay the captured steps, block by block."""
        steps = self._steps or self.prepare(stream.block)
        losses = []
        for feed in stream.steps(start, count):
            left = steps.fill(carry, feed)
            losses.append(steps.losses[:left])
            for size in (UNROLL, 1):
                for _ in range(left // size):
                    self._replays[size]()
                left %= size
            losses[-1] = losses[-1].clone()
            carry = Carry.unflatten([t.clone() for t in steps.carry])
        return carry, torch.cat(losses) if losses else carry.x.new_zeros(0, *carry.step.shape)
