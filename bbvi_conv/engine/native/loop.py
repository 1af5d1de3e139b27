"""Run many steps of a graph in one call of compiled code."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.fx import GraphModule

from bbvi_conv import __version__
from bbvi_conv.engine.native import products, sparse
from bbvi_conv.engine.native.library import is_cached, library, lost, name_of
from bbvi_conv.engine.native.plan import Call, CannotCompile, Plan, View, replace_views, views
from bbvi_conv.program.aten_graph import first_sentence
from bbvi_conv.program.graphs import lift, results, widest
from bbvi_conv.program.noise import ALONE

_CALL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)

WIDE = 2**15
"""Numbers in the widest tensor of a step from which each operation rounds as torch's own do: networks, which spend most
time in products of matrices, amplify roundings. Below, a product and a sum are one operation with one rounding."""


def _whole(tensor: Tensor) -> Tensor:
    """The tensor as the only one in its memory, from its beginning."""
    own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if own else tensor.clone(memory_format=torch.preserve_format)


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


class StoppedEarly(RuntimeError):
    """A step found an index that is out of range."""


class NativeLoop:
    """``(carry, held, moving inputs, rows, fixed inputs) -> (carry, other results)``, T times, in one call.

    The first results of the graph replace the carry, its first inputs; the others are kept for every step.

    Args:
        graph: ATen operations without mutation.
        example: one tensor per input, of the shapes of one step.
        carry: how many inputs the step replaces.
        moving: how many inputs change from step to step; they come after what is held.
        held: how many inputs after the carry are given anew with every call, and are the same for all its steps.
        resident: data whose rows, drawn at every step, are the inputs after those.
        threads: threads of the generated code.
        checked: stop at an index that is out of range, which costs up to a quarter of a small step; else such an index
            must not occur.

    Raises:
        CannotCompile, NoCompiler: with the reason.
    """

    def __init__(
        self,
        graph: GraphModule,
        example: Sequence[Tensor],
        carry: int,
        moving: int,
        *,
        held: int = 0,
        resident: Sequence[Tensor] = (),
        threads: int = 1,
        checked: bool = False,
    ) -> None:
        self.carry, self.moving, self.held, self.threads, self.checked = carry, moving, held, threads, checked
        self._resident = [data.contiguous() for data in resident]
        self._changing = changing = carry + held + moving + len(resident)
        lifted, constants = lift(graph, numbers=True)
        whole = (*example[changing:], *constants)
        sparse.mark(lifted, {**self._drawn(example), **dict(enumerate(whole, changing))})
        fixed = [_whole(t) for t in whole]
        self._example = [*(torch.empty(t.shape, dtype=t.dtype) for t in example[:changing]), *fixed]
        self._graph = lifted
        self.results = results(graph)[carry:]
        shapes = "; ".join(f"{t.dtype} {tuple(t.shape)} {t.stride()}" for t in self._example)
        self._contracted = widest(graph) < WIDE
        described = f"{lifted.code}\n{shapes}\n{carry} {threads} {checked} {products.makers()}"
        self.name = name_of(described, __version__, contracted=self._contracted)

    def _drawn(self, example: Sequence[Tensor]) -> dict[int, Tensor]:
        """What rows of the resident data look like, by the number of their input: some from everywhere in them."""
        first, found = self.carry + self.held + self.moving, {}
        for number, data in enumerate(self._resident, first):
            leading = example[number].shape[: example[number].dim() - data.dim() + 1]
            count = leading.numel()
            rows = torch.arange(count) * (len(data) - 1) // max(count - 1, 1)
            found[number] = data[rows].reshape(*leading, *data.shape[1:])
        return found

    @property
    def cached(self) -> bool:
        """Whether making it will not take long."""
        return is_cached(self.name)

    def lost(self, seconds: float) -> float:
        """Note what a run loses without it; what all have lost so far."""
        return lost(self.name, seconds)

    def load(self) -> bool:
        """Make or load the library and its memory; whether it was made now."""
        self._library, self._plan, made = library(self.name, self._lowered, contracted=self._contracted)
        self._lay()
        return made

    def twin(self) -> NativeLoop:
        """The same loaded loop over memory of its own, for another thread; what is fixed they share."""
        other = copy(self)
        own, shared = self._example[: self._changing], self._example[self._changing :]
        other._example = [*map(torch.empty_like, own), *shared]
        other._lay()
        return other

    def _lay(self) -> None:
        """Lay out the memory of a step, and bind torch's operations to it."""
        plan = self._plan
        self._memory = [_bytes(t) for t in self._example]
        inputs = len(self._memory)
        outs = [torch.empty(size, dtype=torch.uint8) for size in plan.inputs[inputs:]]
        scratch = torch.empty(plan.scratch, dtype=torch.uint8)
        self._memory += [*outs, scratch, *(torch.empty(0, dtype=torch.uint8) for _ in range(plan.taken))]
        self._slots = (ctypes.c_void_p * len(self._memory))(*(t.data_ptr() for t in self._memory))
        kept = len(self._memory) - plan.taken
        self._calls = [_Bound(call, self._memory, self._slots, kept) for call in plan.calls()]
        self._error: BaseException | None = None
        self._last: list[tuple[ref[Tensor], int]] = []
        self._callback = _CALL(self._call)

    def _lowered(self) -> Iterator[Plan]:
        """The plan; and a checked one, should the compiler refuse its text: Inductor drops what only an index reads."""
        yield self._lower(checked=self.checked)
        if not self.checked:
            yield self._lower(checked=True)

    def _lower(self, *, checked: bool) -> Plan:
        with ALONE, warnings.catch_warnings():  # what torch says to itself, at import and in its lowerings
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            try:
                from bbvi_conv.engine.native.lowering import lower
            except ImportError as error:
                raise CannotCompile(f"this torch has another Inductor than the one known: {error}") from error
            try:
                return lower(self._graph, self._example, self.carry, threads=self.threads, checked=checked)
            except CannotCompile:
                raise
            except Exception as error:  # whatever Inductor cannot do, the traced engine can
                raise CannotCompile(first_sentence(error)) from error

    def _call(self, number: int) -> int:
        try:
            self._calls[number]()
        except BaseException as error:
            self._error = error
            return 1
        return 0

    def __call__(
        self, given: Sequence[Tensor], moving: Sequence[Tensor], steps: int, rows: Tensor | None = None
    ) -> tuple[list[Tensor], ...]:
        """Run ``steps`` steps.

        Args:
            given: tensors of the carry, and what is held; left as they are. What the last call returned, and nobody has
                changed since by an operation of torch's, is not copied again.
            moving: one tensor ``(steps, ...)`` per moving input.
            steps: T.
            rows: ``(steps, ...)``, rows of the resident data, as many as an input has.

        Returns:
            The carry, and the other results, each ``(steps, ...)``.
        Raises:
            StoppedEarly: at an index that is out of range, in checked code.
        """
        for slot, value, last in zip(self._example, given, self._returned(len(given)), strict=False):
            if last is None or last[0]() is not value or last[1] != value._version:
                slot.copy_(value)
        feeds = [m.contiguous() for m in moving]
        kept = [torch.empty((steps, *meta.shape), dtype=meta.dtype) for meta in self.results]
        first = len(self._example)
        begin = self.carry + self.held
        gathered = begin + self.moving
        drawn = torch.empty(0, dtype=torch.int64) if rows is None else rows.to(torch.int64).contiguous()
        made = self._library.advance(
            ctypes.c_int64(steps),
            self._slots,
            self._callback,
            *_table(range(begin, gathered), feeds),
            ctypes.c_int64(drawn.numel() // max(steps, 1)),
            ctypes.c_void_p(drawn.data_ptr()),
            *_table(range(gathered, gathered + len(self._resident)), self._resident),
            *_table(range(first, first + len(kept)), kept),
        )
        if made < steps:
            error, self._error = self._error, None
            raise error if error is not None else StoppedEarly("the compiled loop stopped early")
        carry = [slot.clone() for slot in self._example[: self.carry]]
        self._last = [(ref(value), value._version) for value in carry]
        return carry, kept

    def _returned(self, count: int) -> list[tuple[ref[Tensor], int] | None]:
        """What the last call returned, and is in its place still; from now on not any more."""
        last, self._last = self._last, []
        return [*last, *(None for _ in range(count - len(last)))]


def _table(slots: range, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Arguments of the entry point: how many, their slots, addresses, and bytes of one of their rows."""
    count = len(tensors)
    return (
        ctypes.c_int64(count),
        (ctypes.c_int64 * count)(*slots),
        (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors)),
        (ctypes.c_int64 * count)(*(t[:1].numel() * t.itemsize for t in tensors)),
    )


class _Bound:
    """A call of an operation of torch on the loop's memory.

    Args:
        call: the call.
        memory: bytes, slot by slot.
        slots: their addresses, as generated code reads them.
        kept: slots from here on hold what torch gave last: their memory and address are replaced.
    """

    def __init__(self, call: Call, memory: list[Tensor], slots: Any, kept: int) -> None:
        namespace, name, overload = call.target.split(".")
        self._target = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        self._memory, self._slots = memory, slots

        def on(view: View) -> Tensor | View:
            return view.on(memory) if view.place.slot < kept else view

        self._args, self._kwargs = replace_views((call.args, call.kwargs), on)
        self._moves = bool(views((self._args, self._kwargs)))
        self._results = [on(view) for view in call.results]

    def __call__(self) -> None:
        args, kwargs = self._args, self._kwargs
        if self._moves:
            args, kwargs = replace_views((args, kwargs), lambda view: view.on(self._memory))
        for result in self._results:
            if isinstance(result, View):  # given back first, so that torch finds it free
                self._memory[result.place.slot] = torch.empty(0, dtype=torch.uint8)
        out = self._target(*args, **kwargs)
        if self._results:
            made = out if isinstance(out, (list, tuple)) else (out,)
            for target, value in zip(self._results, (t for t in made if isinstance(t, Tensor)), strict=True):
                if isinstance(target, View):
                    self._take(value, target)
                else:
                    target.copy_(value)

    def _take(self, value: Tensor, view: View) -> None:
        """Let the memory of a result be that of its slot."""
        if value.stride() != view.stride or value.storage_offset():
            value = torch.empty_strided(view.size, view.stride, dtype=value.dtype).copy_(value)
        slot = view.place.slot
        self._memory[slot] = _bytes(value)
        self._slots[slot] = value.data_ptr()
