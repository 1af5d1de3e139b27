"""What a compiled loop does at each step, as plain data: kernels on fixed memory, and calls of torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class CannotCompile(RuntimeError):
    """The graph has no compiled form; the reason is the message."""


ALIGN = 64
"""Bytes: a cache line, and the widest vector."""

WORTH = 2**16
"""Bytes from which a result that torch allocates is taken as it lies, not copied to scratch memory."""


class Place(NamedTuple):
    """A position in memory: ``slot`` (after lowering an input, scratch, or a result of torch), ``offset`` in bytes."""

    slot: int
    offset: int


class View(NamedTuple):
    """A tensor in memory; strides in elements."""

    place: Place
    dtype: str
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """From the first number to the last."""
        used = 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True)) if all(self.size) else 0
        return used * int(getattr(torch, self.dtype).itemsize)

    def on(self, memory: Sequence[Tensor]) -> Tensor:
        """The tensor over flat byte tensors, one per slot."""
        begin = self.place.offset
        flat = memory[self.place.slot][begin : begin + self.nbytes].view(getattr(torch, self.dtype))
        return flat.as_strided(self.size, self.stride)


@dataclass(frozen=True)
class Kernel:
    """A call of generated code: pointers only."""

    name: str
    types: tuple[str, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Call:
    """A call of an operation of torch, by name; ``results``: what it allocates, copied or taken to their places."""

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[View, ...]


@dataclass(frozen=True)
class Copy:
    """``size`` bytes from one place to another; inside a loop, either end may move by ``size`` per round."""

    source: Place
    target: Place
    size: int
    moves: str = ""


@dataclass(frozen=True)
class Loop:
    """``rounds`` of a body; ``before`` and ``after`` frame each round with copies of slices."""

    rounds: int
    reverse: bool
    before: tuple[Copy, ...]
    body: tuple[Instruction, ...]
    after: tuple[Copy, ...]


Instruction = Kernel | Call | Copy | Loop


@dataclass(frozen=True)
class Plan:
    """A step over fixed memory.

    Attributes:
        inputs: size in bytes of each input slot.
        scratch: bytes of the one slot after them.
        taken: number of slots after that, each the memory of what an operation of torch last gave there.
        code: what a step does, in order.
        sources: C++ text of the kernels.
    """

    inputs: tuple[int, ...]
    scratch: int
    taken: int
    code: tuple[Instruction, ...]
    sources: tuple[str, ...] = field(default=(), compare=False)

    def calls(self) -> list[Call]:
        """Calls of torch's operations in the order of their numbers."""
        return [i for i in _walk(self.code) if isinstance(i, Call)]


def _walk(code: Sequence[Instruction]) -> list[Instruction]:
    found: list[Instruction] = []
    for instruction in code:
        found.append(instruction)
        if isinstance(instruction, Loop):
            found += _walk(instruction.body)
    return found


def places(instruction: Instruction) -> list[Place]:
    """Every place an instruction touches."""
    if isinstance(instruction, Kernel):
        return list(instruction.places)
    if isinstance(instruction, Copy):
        return [instruction.source, instruction.target]
    if isinstance(instruction, Loop):
        return [
            p for part in (instruction.before, instruction.body, instruction.after) for i in part for p in places(i)
        ]
    return [view.place for view in views((instruction.args, instruction.kwargs, instruction.results))]


def views(value: Any) -> list[View]:
    """Every view inside nested arguments."""
    if isinstance(value, View):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [v for part in value for v in views(part)] if isinstance(value, (list, tuple)) else []


def replace_views(value: Any, change: Callable[[View], Any]) -> Any:
    """Nested arguments with every view changed."""
    if isinstance(value, View):
        return change(value)
    if isinstance(value, dict):
        return {key: replace_views(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replace_views(part, change) for part in value)
    return value


def relocate(instruction: Instruction, where: Callable[[Place], Place]) -> Instruction:
    """The same instruction over other places."""
    if isinstance(instruction, Kernel):
        return Kernel(instruction.name, instruction.types, tuple(map(where, instruction.places)))
    if isinstance(instruction, Copy):
        return Copy(where(instruction.source), where(instruction.target), instruction.size, instruction.moves)
    if isinstance(instruction, Loop):
        before, body, after = (
            tuple(relocate(i, where) for i in part)
            for part in (instruction.before, instruction.body, instruction.after)
        )
        return Loop(instruction.rounds, instruction.reverse, before, body, after)  # type: ignore[arg-type]

    def moved(view: View) -> View:
        return view._replace(place=where(view.place))

    args, kwargs, results = replace_views((instruction.args, instruction.kwargs, instruction.results), moved)
    return Call(instruction.target, args, kwargs, results)


def pack(inputs: int, sizes: dict[int, int], code: Sequence[Instruction]) -> tuple[tuple[Instruction, ...], int, int]:
    """Lay slots that are not inputs into one scratch slot, sharing memory between those never needed together.

    What torch allocates for a large result of its own stays where it is, in a slot after that.

    Args:
        inputs: slots ``0 .. inputs - 1`` keep their memory.
        sizes: bytes of every other slot.
        code: instructions over slots.

    Returns:
        The instructions over inputs, scratch (slot ``inputs``) and what follows; bytes of scratch; slots after it.
    """
    given = [view for i in _walk(code) if isinstance(i, Call) for view in i.results]
    large = [v.place.slot for v in given if v.place.offset == 0 and v.nbytes == sizes.get(v.place.slot, -1) >= WORTH]
    own = {slot: inputs + 1 + number for number, slot in enumerate(large)}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for at, instruction in enumerate(code):
        for place in places(instruction):
            if place.slot in sizes and place.slot not in own:
                first.setdefault(place.slot, at)
                last[place.slot] = at
    taken: list[tuple[int, int, int]] = []  # begin, end, last use
    begin: dict[int, int] = {}
    for slot in sorted(first, key=lambda s: (first[s], s)):
        size = -(-max(sizes[slot], 1) // ALIGN) * ALIGN
        taken = sorted(t for t in taken if t[2] >= first[slot])
        at = 0
        for low, high, _ in taken:
            if low - at >= size:
                break
            at = max(at, high)
        begin[slot] = at
        taken.append((at, at + size, last[slot]))
    total = max((begin[s] + -(-max(sizes[s], 1) // ALIGN) * ALIGN for s in begin), default=0)

    def where(place: Place) -> Place:
        if place.slot < inputs:
            return place
        if place.slot in own:
            return Place(own[place.slot], place.offset)
        return Place(inputs, begin[place.slot] + place.offset)

    return tuple(relocate(i, where) for i in code), total, len(large)
