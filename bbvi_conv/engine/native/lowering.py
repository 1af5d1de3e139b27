"""From an ATen graph to a :class:`Plan`: torch's Inductor writes the kernels, this module writes down what they act on.

Inductor's own wrapper allocates and releases a tensor per result at every step. Here its wrapper runs once, on tensors
without data, and what it allocates and calls is recorded; the compiled loop then repeats the calls on fixed memory.
Every private interface of Inductor that the package uses is used in this file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch._inductor.compile_fx  # registers lowerings
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from bbvi_conv.engine.native.graphs import results
from bbvi_conv.engine.native.plan import Call, CannotCompile, Instruction, Kernel, Place, Plan, View, pack

SMALL = 2**14
"""Multiplications up to which a matrix product is written as multiply-and-sum, so that it fuses."""

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
        return a * b
    if b.shape[-1] == 1:
        return (a * b.transpose(-1, -2)).sum(-1, keepdim=True)
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def _mv(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = _small_product(a, b)
    return NotImplemented if product is NotImplemented else beta * bias + alpha * product


def _decompositions() -> dict[Any, Any]:
    aten = torch.ops.aten
    own = {
        aten.mm.default: _small_product,
        aten.bmm.default: _small_product,
        aten.mv.default: _mv,
        aten.dot.default: _mv,
        aten.addmm.default: _addmm,
    }
    return {**select_decomp_table(), **own}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Write down every operation that computes; allocations and views only make tensors without data."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.code: list[Instruction] = []
        self.slots: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.kept: list[Any] = []  # storages stay alive, so that their addresses stay theirs
        for tensor in given:
            self.slot(tensor)

    def slot(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.slots:
            self.slots[storage._cdata] = len(self.slots)
            self.kept.append((storage, tensor))
        number = self.slots[storage._cdata]
        self.sizes[number] = storage.nbytes()
        return number

    def place(self, tensor: Tensor) -> Place:
        return Place(self.slot(tensor), int(tensor.storage_offset()) * tensor.itemsize)

    def view(self, tensor: Tensor) -> View:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return View(self.place(tensor), dtype, tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())))

    def _encode(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.view(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._encode(v) for v in value)
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
            return value
        if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
            return None  # all memory is on the CPU, strided, and laid out by Inductor
        raise CannotCompile(f"an argument of type {type(value).__name__} has no place in a compiled loop")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func.namespace == "prim" or func._schema.name in _ALLOCATES:
            return out
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotCompile(f"random operation {func} is not on the noise tape")
        results = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor)]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        encoded, named = self._encode(list(args)), {k: self._encode(v) for k, v in kwargs.items()}
        kept = () if writes else tuple(self.view(t) for t in results)
        self.code.append(Call(str(func), tuple(encoded), {k: v for k, v in named.items() if v is not None}, kept))
        return out


_ALLOCATES = ("aten::empty_strided", "aten::empty.memory_format", "aten::empty", "aten::empty_like")


def _kernels(module: ast.Module, prefix: str) -> dict[str, tuple[tuple[str, ...], str, str]]:
    """Name in the wrapper -> (argument types, unique name, C++ text)."""
    found = {}
    for node in module.body:
        made = node.value if isinstance(node, ast.Assign) else None
        if not (isinstance(made, ast.Call) and isinstance(made.func, ast.Attribute) and isinstance(node, ast.Assign)):
            continue
        if made.func.attr == "cpp_pybinding" and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            types, text = ast.literal_eval(made.args[0]), ast.literal_eval(made.args[1])
            own = f"{prefix}{name}"
            text, count = re.subn(r'extern "C"\s+void\s+kernel\(', f"static void {own}(", text)
            if count != 1:
                raise CannotCompile("the generated code has another form than the one this version of bbvi_conv knows")
            found[name] = (tuple(types), own, text)
    return found


def _record(code: str, given: Sequence[Tensor], recorder: _Recorder, prefix: str) -> tuple[list[str], Sequence[Tensor]]:
    """Run Inductor's wrapper on tensors without data; returns the kernels' text and the wrapper's results."""
    module = ast.parse(code)
    kernels = _kernels(module, prefix)
    wrapper = next((n for n in ast.walk(module) if isinstance(n, ast.FunctionDef) and n.name == "call"), None)
    if wrapper is None:
        raise CannotCompile("the generated code has no entry point that this version of bbvi_conv knows")

    def kernel(types: tuple[str, ...], name: str) -> Any:
        def call(*tensors: Tensor) -> None:
            if not all(isinstance(t, Tensor) for t in tensors):
                raise CannotCompile("a kernel takes an argument that is not a tensor")
            recorder.code.append(Kernel(name, types, tuple(recorder.place(t) for t in tensors)))

        return call

    def reinterpret(tensor: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
        return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)

    def allocate(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    def ignore(*_: Any, **__: Any) -> None:
        return None

    from torch._inductor.select_algorithm import extern_kernels

    names: dict[str, Any] = {name: kernel(types, own) for name, (types, own, _) in kernels.items()}
    names |= {
        "torch": torch,
        "aten": torch.ops.aten,
        "inductor_ops": torch.ops.inductor,
        "extern_kernels": extern_kernels,
        "device": torch.device,
        "inf": float("inf"),
        "nan": float("nan"),
        "empty_strided_cpu": allocate,
        "reinterpret_tensor": reinterpret,
        "assert_size_stride": ignore,
        "assert_alignment": ignore,
    }
    parameters = [a.arg for a in wrapper.args.args]
    wrapper.decorator_list = []
    entry = ast.Module([wrapper], type_ignores=[])
    exec(compile(ast.fix_missing_locations(entry), "<inductor>", "exec"), names)
    with recorder:
        results = names["call"](*([None] * (len(parameters) - 1)), list(given))
    return [text for _, _, text in kernels.values()], results


def _settings(threads: int) -> dict[str, Any]:
    bits = vector_bits()
    return {
        "cpp.threads": threads,
        "cpp.simdlen": bits or 1,
        "cpp.vec_isa_ok": bool(bits),
        "assert_indirect_indexing": False,
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


def lower(graph: GraphModule, example: Sequence[Tensor], carry: int, *, threads: int = 1) -> Plan:
    """Lower ``graph``, whose first ``carry`` results replace its first ``carry`` inputs, to a plan.

    The inputs of the plan are those of the graph and one more per further result, to which it is written.

    Args:
        graph: ATen operations, no mutation; constants are inputs.
        example: one tensor per input, for shapes and strides.
        carry: how many results replace inputs.
        threads: threads of the generated code.

    Raises:
        CannotCompile: with the reason.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(config.patch(_known(_settings(threads))))
        stack.enter_context(V.set_fake_mode(mode))
        stack.enter_context(tracing(TracingContext(mode)))
        with mode:
            given = [mode.from_tensor(t, static_shapes=True) for t in example]
            metas = results(graph)[carry:]
            outs = [torch.empty(m.shape, dtype=m.dtype) for m in metas]

            def step(*flat: Tensor) -> tuple[()]:
                inputs, outs = flat[: len(given)], flat[len(given) :]
                values = Interpreter(graph).run(*inputs)
                for target, value in zip((*inputs[:carry], *outs), values, strict=True):
                    target.copy_(value)
                return ()

            pure = make_fx(step, decomposition_table=_decompositions())(*given, *outs)
        pure = GraphModule(pure, fx_graph_cse(pure.graph))
        pure.graph.eliminate_dead_code()
        pure.recompile()
        everything = [*given, *outs]
        code = _lower(pure, everything, mode)
        recorder = _Recorder(everything)
        with mode:
            sources, _ = _record(code, everything, recorder, "k0_")
    count = len(everything)
    if len(recorder.slots) < count or any(recorder.slot(t) != i for i, t in enumerate(everything)):
        raise CannotCompile("two inputs share memory")
    sizes = {slot: size for slot, size in recorder.sizes.items() if slot >= count}
    packed, scratch = pack(count, sizes, recorder.code)
    return Plan(tuple(recorder.sizes[i] for i in range(count)), scratch, packed, tuple(sources))
