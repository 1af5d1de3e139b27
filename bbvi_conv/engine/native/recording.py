"""Write down what Inductor's wrapper allocates and calls, by running it once on tensors without data."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bbvi_conv.engine.native.inductor import extern_kernels
from bbvi_conv.engine.native.plan import Call, CannotCompile, Instruction, Kernel, Place, View

_ALLOCATES = ("aten::empty_strided", "aten::empty.memory_format", "aten::empty", "aten::empty_like")


class Pending(NamedTuple):
    """A scan, still to be lowered: its body's name, and tensors without data."""

    name: str
    carry: list[Tensor]
    xs: list[Tensor]
    fixed: list[Tensor]
    reverse: bool
    results: list[Tensor]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Write down every operation that computes; allocations and views only make tensors without data."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.code: list[Instruction | Pending] = []
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

    def _scan(self, name: str, carry: Any, xs: Any, fixed: Any, reverse: bool, results: Any) -> None:
        """Keep a scan for later; what it copies slice by slice must be contiguous."""
        given = [[self._contiguous(t) for t in part] for part in (carry, xs)]
        for tensor in (*given[0], *given[1], *fixed, *results):
            self.slot(tensor)
        self.code.append(Pending(name, given[0], given[1], list(fixed), reverse, list(results)))

    def _contiguous(self, tensor: Tensor) -> Tensor:
        if tensor.is_contiguous():
            return tensor
        copied = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.code.append(Call("aten.clone.default", (self.view(tensor),), {}, (self.view(copied),)))
        return copied

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func.namespace == "prim" or func._schema.name in _ALLOCATES:
            return out
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotCompile(f"random operation {func} is not on the noise tape")
        if func is torch.ops.bbvi_conv.scan.default:
            name, carry, xs, fixed, reverse = args
            self._scan(name, carry, xs, fixed, reverse, out)
            return out
        results = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor)]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        encoded, named = self._encode(list(args)), {k: self._encode(v) for k, v in kwargs.items()}
        kept = () if writes else tuple(self.view(t) for t in results)
        self.code.append(Call(str(func), tuple(encoded), {k: v for k, v in named.items() if v is not None}, kept))
        return out


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


def record(code: str, given: Sequence[Tensor], recorder: Recorder, prefix: str) -> list[str]:
    """Run Inductor's wrapper ``code`` on tensors without data, under ``recorder``; the kernels' C++ text.

    Raises:
        CannotCompile: where the wrapper has a form not known here.
    """
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
        names["call"](*([None] * (len(parameters) - 1)), list(given))
    return [text for _, _, text in kernels.values()]
