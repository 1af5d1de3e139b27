"""Whether generated code reads the old value of an input after it has written the new one in its place.

Inductor promises that it does not, and versions of it break the promise: with several sums over the same input in one
kernel, some came after the loop that overwrote it. So the promise is checked, on the text of every kernel.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from bbvi_conv.engine.native.plan import Call, Instruction, Kernel, places, views
from bbvi_conv.engine.native.recording import Pending, Recorder

_POINTER = r"\w*_ptr\d+"
_STORE = re.compile(rf"\.store\(\s*({_POINTER})|({_POINTER})\[[^\[\]]*\]\s*=(?!=)")
_LOAD = re.compile(rf"loadu\(\s*({_POINTER})|({_POINTER})\[")
_NAME = re.compile(rf"\b{_POINTER}\b")
_FOR = re.compile(r"\bfor\s*\(")
_ALIAS = re.compile(rf"auto\s+({_POINTER})\s*=\s*({_POINTER})\s*;")


class Access(NamedTuple):
    """A mention of a pointer: its place among the arguments, what it does, and where the outermost loop around begins.

    Outside loops ``region`` is the mention's own position.
    """

    argument: int
    reads: bool
    writes: bool
    region: int


def accesses(text: str) -> list[Access]:
    """Every mention of a pointer in the body of a kernel, in order.

    >>> accesses("static void k(const float* in_ptr0, float* out_ptr0) { out_ptr0[0] = 2 * in_ptr0[0]; }")
    [Access(argument=1, reads=False, writes=True, region=4), Access(argument=0, reads=True, writes=False, region=22)]
    """
    begin = text.index("(", text.index("static void"))
    end = text.index(")", begin)
    arguments = {name: i for i, name in enumerate(_NAME.findall(text[begin:end]))}
    body = text[end:]
    for alias, name in _ALIAS.findall(body):
        arguments[alias] = arguments[name]
    body = _ALIAS.sub(lambda found: " " * len(found.group()), body)
    stores = {found.start(1 if found.group(1) else 2) for found in _STORE.finditer(body)}
    loads = {found.start(1 if found.group(1) else 2) for found in _LOAD.finditer(body)} - stores
    loops, made, at = list(_outermost_loops(body)), [], 0
    for found in _NAME.finditer(body):
        place, constant = found.start(), found.group().startswith("in_ptr")
        while at < len(loops) and loops[at][1] <= place:
            at += 1
        region = loops[at][0] if at < len(loops) and loops[at][0] <= place else place
        writes = not constant and place not in loads  # what is handed to a function may be written by it
        made.append(Access(arguments[found.group()], place not in stores, writes, region))
    return made


def _outermost_loops(body: str) -> Iterator[tuple[int, int]]:
    """Begin and end of every ``for`` that is in no other."""
    at = 0
    while (found := _FOR.search(body, at)) is not None:
        at = _closed(body, body.index("{", _closed(body, found.end() - 1)))
        yield found.start(), at


def _closed(body: str, at: int) -> int:
    """Just after the bracket that closes the one at ``at``."""
    depth = 0
    for place in range(at, len(body)):
        if body[place] in "({":
            depth += 1
        elif body[place] in ")}":
            depth -= 1
            if depth == 0:
                return place + 1
    raise ValueError("the generated code has brackets that do not close")


def overwritten_too_soon(
    code: Sequence[Instruction | Pending], sources: Sequence[str], carried: Collection[int], recorder: Recorder
) -> bool:
    """Whether something reads one of the slots ``carried`` after another loop, kernel or call has written to it."""
    texts = {re.findall(r"static void (\w+)\(", text)[0]: accesses(text) for text in sources}
    written: dict[int, tuple[int, int]] = {}
    for number, instruction in enumerate(code):
        for slot, reads, writes, region in _touched(instruction, texts, recorder):
            here = (number, region)
            if slot in carried and reads and written.get(slot, here) != here:
                return True
            if slot in carried and writes:
                written.setdefault(slot, here)
    return False


def _touched(
    instruction: Instruction | Pending, texts: Mapping[str, Sequence[Access]], recorder: Recorder
) -> Iterator[tuple[int, bool, bool, int]]:
    """``(slot, reads, writes, region)`` of everything an instruction touches, in order."""
    if isinstance(instruction, Kernel):
        for access in texts[instruction.name]:
            yield instruction.places[access.argument].slot, access.reads, access.writes, access.region
    elif isinstance(instruction, Pending):
        for tensor in (*instruction.carry, *instruction.xs, *instruction.fixed):
            yield recorder.slot(tensor), True, False, 0
    elif isinstance(instruction, Call):
        given = [view.place.slot for view in views((instruction.args, instruction.kwargs))]
        in_place = instruction.target.split(".")[1].endswith("_")
        changed = [instruction.results, instruction.kwargs.get("out"), instruction.args[:1] if in_place else ()]
        yield from ((slot, True, False, 0) for slot in given)
        yield from ((view.place.slot, False, True, 0) for view in views(changed))
    else:
        yield from ((place.slot, True, True, 0) for place in places(instruction))
