"""From an ATen graph to a :class:`Plan`: torch's Inductor writes the kernels, a recorder what they act on.

Inductor's own wrapper allocates and releases a tensor per result at every step. Here its wrapper runs once, on tensors
without data, and what it allocates and calls is recorded; the compiled loop then repeats the calls on fixed memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from bbvi_conv.engine.native import functions, joining, products, sparse, vectors
from bbvi_conv.engine.native.hazards import overwritten_too_soon
from bbvi_conv.engine.native.inductor import (
    DebugContext,
    FakeTensorMode,
    GraphLowering,
    SchedulerNode,
    ShapeEnv,
    TracingContext,
    V,
    config,
    fx_graph_cse,
    recomputed,
    select_decomp_table,
    tracing,
)
from bbvi_conv.engine.native.layout import Ordered, settled
from bbvi_conv.engine.native.plan import CannotCompile, Copy, Instruction, Loop, Place, Plan, pack
from bbvi_conv.engine.native.recording import Pending, Recorder, record
from bbvi_conv.program.graph_module import WrittenLate
from bbvi_conv.program.graphs import results
from bbvi_conv.program.scan import BODIES

SMALL = 2**14
"""Multiplications up to which a matrix product is written as multiply-and-sum, so that it fuses."""

SHORT = 32
"""Numbers up to which their running sums and products are written as sums of each beginning, so that they fuse."""

SIMD = {"AVX512": 512, "AVX2": 256}
"""Vector bits by the name torch gives the processor."""


def vector_bits() -> int:
    """Width of the processor's vectors as the generated code is to use them; 0: none."""
    return SIMD.get(torch.backends.cpu.get_cpu_capability(), 0)


def _small_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` over the last two dimensions as multiply-and-sum, where small enough to fuse."""
    if a.shape.numel() * b.shape[-1] > SMALL:
        return NotImplemented  # type: ignore[no-any-return]
    if a.shape[-1] == 1:
        return settled(a * b)
    if b.shape[-1] == 1:
        return (a * b.transpose(-1, -2)).sum(-1, keepdim=True)
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` by one division, where ``b`` is a number that is computed."""
    if not isinstance(b, Tensor) or b.dim() or not a.dim() or a.dtype != b.dtype or not a.is_floating_point():
        return NotImplemented  # type: ignore[no-any-return]
    return a * b.reciprocal()


def _isnan(x: Tensor) -> Tensor:
    """By a comparison of vectors; torch's code asks number by number."""
    return x != x


def _isinf(x: Tensor) -> Tensor:
    return x.abs() == math.inf


def _silu(x: Tensor) -> Tensor:
    """By the sigmoid, which its derivative needs as well."""
    return x * x.sigmoid()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _mv(a: Tensor, b: Tensor) -> Tensor:
    return (a * settled(b)).sum(-1)


def _running(x: Tensor, dim: int, neutral: float) -> Tensor:
    """Each beginning of ``x`` along a dimension, filled up with ``neutral``, along a last dimension."""
    places = torch.arange(x.shape[dim], device=x.device)
    return torch.where(places.unsqueeze(-1) >= places, x.movedim(dim, -1).unsqueeze(-2), neutral)


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    if not x.dim() or x.shape[dim] > SHORT:
        return NotImplemented  # type: ignore[no-any-return]
    return _running(x, dim, 0).sum(-1, dtype=dtype).movedim(-1, dim)


def _cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    if not x.dim() or x.shape[dim] > SHORT:
        return NotImplemented  # type: ignore[no-any-return]
    return _running(x, dim, 1).prod(-1, dtype=dtype).movedim(-1, dim)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = _small_product(a, b)
    return NotImplemented if product is NotImplemented else beta * bias + alpha * product


def _decompositions() -> dict[Any, Any]:
    aten = torch.ops.aten
    own = {
        aten.mm.default: _small_product,
        aten.bmm.default: _small_product,
        aten.mv.default: _mv,
        aten.dot.default: _dot,
        aten.addmm.default: _addmm,
        aten.cumsum.default: _cumsum,
        aten.cumprod.default: _cumprod,
        aten.div.Tensor: _quotient,
        aten.isnan.default: _isnan,
        aten.isinf.default: _isinf,
        aten.silu.default: _silu,
    }
    known = select_decomp_table()
    return {**known, **functions.decompositions(known), **own}


def _settings(threads: int, checked: bool) -> dict[str, Any]:
    bits = vector_bits()
    return {
        "cpp.threads": threads,
        "cpp.simdlen": bits or 1,
        "cpp.vec_isa_ok": bool(bits),
        "assert_indirect_indexing": checked,
        "size_asserts": False,
        "alignment_asserts": False,
        "cpp_wrapper": False,
        "freezing": False,
        "fallback_random": True,
        "implicit_fallbacks": True,
        "memory_planning": False,
        "max_autotune": False,
        "profiler_mark_wrapper_call": False,
    }


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that this version of torch has."""
    return {name: value for name, value in settings.items() if _has(name)}


def _has(name: str) -> bool:
    value: Any = config
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def _lower(graph: GraphModule, given: Sequence[Tensor], mode: FakeTensorMode) -> str:
    lowering = GraphLowering(graph, example_inputs=given, shape_env=mode.shape_env, is_inference=True)
    with V.set_graph_handler(lowering), DebugContext():
        lowering.run(*given)
        code = lowering.codegen()[0]
    if lowering.constants:
        raise CannotCompile("the generated code holds a constant tensor")
    return str(getattr(code, "value", code))


class _Lowering:
    """Graphs to instructions over the slots of one recorder: that of a step, and those of the scans inside it."""

    def __init__(self, recorder: Recorder, mode: FakeTensorMode, threads: int) -> None:
        self.recorder, self.mode, self.threads = recorder, mode, threads
        self.sources: list[str] = []
        self._graphs = 0

    def instructions(
        self, graph: GraphModule, given: Sequence[Tensor], carry: int, outs: Sequence[Tensor]
    ) -> list[Instruction]:
        """What computes ``graph`` on ``given``, its first results back into ``given``, the others into ``outs``.

        Where Inductor's order would read a value after the new one has taken its place, results are copied at the end.
        """
        own = given[:carry]
        made, sources = self._written(graph, given, [*own, *outs])
        copies: list[Copy] = []
        if overwritten_too_soon(made, sources, {self.recorder.slot(t) for t in own}, self.recorder):
            with self.mode:
                apart = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in own]
            made, sources = self._written(graph, given, [*apart, *outs])
            place = self.recorder.place
            copies = [_copy(place(new), place(old), old, "") for new, old in zip(apart, own, strict=True)]
        self.sources += sources
        made = joining.settled(made, self.recorder)
        with self.mode:
            made, more = products.written(made, self.recorder, self.threads, f"k{self._graphs}_")
        self.sources += [text for text in more if text not in self.sources]
        return [*(i for part in made for i in (self._scan(part) if isinstance(part, Pending) else [part])), *copies]

    def _written(
        self, graph: GraphModule, given: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> tuple[list[Instruction | Pending], list[str]]:
        """What computes ``graph`` on ``given`` and writes its results to ``targets``; and the kernels' text."""
        changed = [t for t in targets if all(t is not g for g in given)]
        everything = [*given, *changed]

        def step(*flat: Tensor) -> tuple[()]:
            memory = dict(zip(map(id, everything), flat, strict=True))
            values = Ordered(graph, vector_bits()).run(*flat[: len(given)])
            moves = [(memory[id(target)], value) for target, value in zip(targets, values, strict=True)]
            places = {t.untyped_storage()._cdata for t in flat}
            # an input that is given back as another result is read before it is overwritten
            moves = [(t, v.clone() if v is not t and v.untyped_storage()._cdata in places else v) for t, v in moves]
            for target, value in moves:
                target.copy_(value)
            return ()

        with self.mode:
            pure = make_fx(step, decomposition_table=_decompositions())(*everything)
        pure = WrittenLate(pure, fx_graph_cse(pure.graph))
        pure.graph.eliminate_dead_code()
        joining.mark(pure)
        pure.recompile()
        code = _lower(pure, everything, self.mode)
        self.recorder.code = []
        with self.mode:
            sources = record(code, everything, self.recorder, f"k{self._graphs}_")
        self.recorder.code = sparse.given_place(self.recorder.code)
        self._graphs += 1
        return self.recorder.code, sources

    def _scan(self, scan: Pending) -> list[Instruction]:
        """A loop over the body of a scan, with copies of slices in and out."""
        body, slots = BODIES[scan.name], self.recorder
        rounds = len(scan.xs[0])
        with self.mode:
            state = [torch.empty(c.shape, dtype=c.dtype) for c in scan.carry]
            slices = [torch.empty(x.shape[1:], dtype=x.dtype) for x in scan.xs]
            ys = [torch.empty(shape, dtype=dtype) for shape, dtype in body.results[body.carry :]]
        inner = self.instructions(body.plain, [*state, *slices, *scan.fixed], body.carry, ys)
        last, kept, given = (
            scan.results[: body.carry],
            scan.results[body.carry : 2 * body.carry],
            scan.results[2 * body.carry :],
        )

        def copies(sources: Sequence[Tensor], targets: Sequence[Tensor], moves: str) -> list[Copy]:
            """From whole to whole, or from or to the slice of the round."""
            pairs = zip(sources, targets, strict=True)
            return [_copy(slots.place(a), slots.place(b), a if moves == "target" else b, moves) for a, b in pairs]

        before = [*copies(scan.xs, slices, "source"), *copies(state, kept, "target")]
        loop = Loop(rounds, scan.reverse, tuple(before), tuple(inner), tuple(copies(ys, given, "target")))
        return [*copies(scan.carry, state, ""), loop, *copies(state, last, "")]


def _copy(source: Place, target: Place, part: Tensor, moves: str) -> Copy:
    return Copy(source, target, part.numel() * part.itemsize, moves)


def lower(
    graph: GraphModule, example: Sequence[Tensor], carry: int, *, threads: int = 1, checked: bool = False
) -> Plan:
    """Lower ``graph``, whose first ``carry`` results replace its first ``carry`` inputs, to a plan.

    The inputs of the plan are those of the graph and one more per further result, to which it is written.

    Args:
        graph: ATen operations, no mutation; constants are inputs.
        example: one tensor per input, for shapes and strides.
        carry: how many results replace inputs.
        threads: threads of the generated code.
        checked: throw at an index that is out of range.

    Raises:
        CannotCompile: with the reason.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(mock.patch.object(SchedulerNode, "recompute_size_and_body", recomputed))
        stack.enter_context(config.patch(_known(_settings(threads, checked))))
        stack.enter_context(V.set_fake_mode(mode))
        stack.enter_context(tracing(TracingContext(mode)))
        with mode:
            given = [mode.from_tensor(t, static_shapes=True) for t in example]
            outs = [torch.empty(m.shape, dtype=m.dtype) for m in results(graph)[carry:]]
        everything = [*given, *outs]
        lowering = _Lowering(Recorder(everything), mode, threads)
        code = lowering.instructions(graph, given, carry, outs)
    recorder, count = lowering.recorder, len(everything)
    if len(recorder.slots) < count or any(recorder.slot(t) != i for i, t in enumerate(everything)):
        raise CannotCompile("two inputs share memory")
    packed, scratch, taken = pack(count, {slot: size for slot, size in recorder.sizes.items() if slot >= count}, code)
    sources = vectors.mended(lowering.sources, vector_bits())
    return Plan(tuple(recorder.sizes[i] for i in range(count)), scratch, taken, packed, sources)
