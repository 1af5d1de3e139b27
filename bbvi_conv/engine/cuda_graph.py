"""Steps on a CUDA device without the host between them: one step over fixed tensors, fused, captured and replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx import GraphModule

from bbvi_conv.engine.engine import Carry, TracedEngine, float32_products
from bbvi_conv.engine.fused import fused, with_fused_rounds
from bbvi_conv.engine.native import CannotCompile
from bbvi_conv.engine.streams import Feed, Stream, block_of
from bbvi_conv.program.aten_graph import first_sentence, to_graph
from bbvi_conv.program.graphs import lift
from bbvi_conv.program.scan import operations

UNROLL = 16
"""Steps in the longer of the two captured graphs; what is left of a chunk is replayed one by one."""
MOST_CAPTURED = 20_000
"""Operations of the longer graph at most, but for those of a single step."""
WARM_UP = 3
"""Steps run before capturing, so that libraries have made what they keep."""


def has_quick_tensor_cores(device: torch.device) -> bool:
    """Whether float32 products of parts of bfloat16 were measured to be quicker than the library's on such a device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def unrolled(made: int) -> int:
    """Steps in the longer of the two captured graphs, where one has so many operations."""
    return max(1, min(UNROLL, MOST_CAPTURED // made))


class FixedSteps:
    """One unchecked step of a traced engine over fixed tensors: noise and rows are read at a counter on the device.

    Attributes:
        carry: the carry, replaced in place.
        feeds: noise, and rows of a minibatch, of a block of steps, ``(block, ...)``.
        losses: ``(block, ...)``, written at the counter.
        counter: the step within the block, ``(1,)``, on the device.
        graph: the step, of plain operations; changes its inputs.
        run: what runs it; :attr:`graph`, until something faster takes its place.
        operations: how many of them a run makes.
    """

    def __init__(self, traced: TracedEngine) -> None:
        program, carried = traced.calculus.program, traced.carried
        made = traced.side_by_side(traced.num_seeds, checked=False)
        inner, constants = lift(made.graph, numbers=True)
        # single numbers are kept as vectors of one: fused steps fail to change a tensor without dimensions
        own = [t.reshape(t.shape or 1).clone() for t in made.example[:carried]]
        self.carry = [t.view(like.shape) for t, like in zip(own, made.example, strict=False)]
        step = Carry.unflatten(self.carry).step
        block = block_of(program, traced.calculus.objective.draws)
        rows = [] if program.minibatch is None else [torch.arange(program.minibatch.size, device=step.device)]
        given = [*made.example[carried : carried + 2], *(r.expand(*step.shape, -1) for r in rows)]
        self.feeds = [t.new_zeros((block, *t.shape)) for t in given]
        self.losses = step.new_zeros((block, *step.shape))
        self.counter = torch.zeros(1, dtype=torch.int64, device=step.device)
        gathers = bool(rows) and not program.by_index
        whole = [program.args[i] for i in program.batched]
        self._changing = [*own, *self.feeds, self.losses, self.counter]
        self._inputs = [*self._changing, *whole, *constants]

        def one(*flat: Tensor) -> tuple[()]:
            carry = [t.view(like.shape) for t, like in zip(flat, self.carry, strict=False)]
            rest = flat[carried:]
            feeds, (losses, counter, *more) = rest[: len(given)], rest[len(given) :]
            data, fixed = more[: len(whole)], more[len(whole) :]
            normal, uniform, *rows = (feed.index_select(0, counter).squeeze(0) for feed in feeds)
            batch = [part[rows[0]] for part in data] if gathers else [*data, *rows]
            *moved, loss = inner(*carry, normal, uniform, *batch, *fixed)
            for old, new in zip(carry, moved, strict=True):
                if new is not old:
                    old.copy_(new)
            losses.index_copy_(0, counter, loss.unsqueeze(0))
            counter.add_(1)
            return ()

        self.graph: GraphModule = to_graph(one, *self._copies(), functional=False)
        self.run: Callable[..., object] = self.graph
        _, self.operations = operations(self.graph)

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
        self.run(*self._inputs)

    def _copies(self) -> list[Tensor]:
        """Inputs for a step that leaves these as they are; data, which it only reads, may be large and are the same."""
        return [*(t.clone() for t in self._changing), *self._inputs[len(self._changing) :]]

    def fuse(self, *, tf32: bool = False) -> None:
        """Let fewer kernels do the same, and tensor cores what they are quicker at.

        Args:
            tf32: whether products may round float32 numbers to 11 bits.

        Raises:
            CannotCompile: with the reason, as where there is no C compiler.
        """
        graph = self.graph
        try:
            if has_quick_tensor_cores(self.counter.device):
                from bbvi_conv.engine.tensor_cores import on_tensor_cores  # imports torch's compiler

                graph = on_tensor_cores(graph, self._copies(), tf32=tf32)
            graph = with_fused_rounds(graph)
            (_, self.operations), self.run = operations(graph), fused(graph)
            self()  # compiles
        except Exception as error:  # whatever torch's compiler and what it calls may raise
            raise CannotCompile(first_sentence(error)) from error


class CudaGraphEngine:
    """Replays captured steps; nothing is copied to the host inside a chunk.

    Like the compiled engine it looks at the end of a chunk whether all is finite, and lets the traced engine go through
    it once more where not.

    Args:
        traced: the engine whose steps these are, on a CUDA device.
        reason: why this engine.
        fuse: whether the step is compiled before it is captured; its name is then that of the compiled engine.

    Raises:
        CannotCompile: with the reason.
        RuntimeError: what torch says where a step cannot be captured.
    """

    def __init__(self, traced: TracedEngine, reason: str, *, fuse: bool = False) -> None:
        self.calculus, self.num_seeds, self.reason = traced.calculus, traced.num_seeds, reason
        self.name = "compiled" if fuse else "cuda-graph"
        self._traced = traced
        self._replays: dict[int, Callable[[], None]] = {}  # by steps, most first
        with torch.cuda.device(self.calculus.program.device), torch.no_grad(), float32_products(traced.tf32):
            self._steps = FixedSteps(traced)
            if fuse:
                self._steps.fuse(tf32=traced.tf32)
            self._capture()

    def _capture(self) -> None:
        steps = self._steps
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                steps.counter.zero_()
                steps()
        torch.cuda.current_stream().wait_stream(side)
        pool = None
        for count in sorted({unrolled(steps.operations), 1}, reverse=True):
            graph = torch.cuda.CUDAGraph()
            with _undisturbed(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                for _ in range(count):
                    steps()
            self._replays[count], pool = graph.replay, graph.pool()

    def advance(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Replay the captured steps, block by block."""
        steps, moved, losses = self._steps, carry, []
        for feed in stream.steps(start, count):
            made = left = steps.fill(moved, feed)
            for size, replay in self._replays.items():
                for _ in range(left // size):
                    replay()
                left %= size
            losses.append(steps.losses[:made].clone())
            moved = Carry.unflatten([t.clone() for t in steps.carry])
        end = moved, torch.cat(losses) if losses else carry.x.new_zeros(0, *carry.step.shape)
        return self._traced.finite_or_again(end, carry, stream, start, count)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Collect garbage before, not while a graph is captured: what releases memory of the device ends the capture."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
