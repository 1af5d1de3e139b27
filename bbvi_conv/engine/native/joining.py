"""The vector of all gradients, written where it is made: a layer's product gives its part of it, nothing is copied.

Inductor lets torch's products write to memory of their own and copies them into a vector. Here the vector is an
operation that it does not know, and once its wrapper is written down, what makes a part is given the part's place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bbvi_conv.engine.native import sparse
from bbvi_conv.engine.native.plan import Call, Copy, Instruction, Place, View, places
from bbvi_conv.engine.native.products import CALLS
from bbvi_conv.engine.native.recording import Pending, Recorder

LARGE = 2**16
"""Numbers from which a part is worth it; smaller ones are copied."""

_aten: Any = torch.ops.aten
_SHAPES = (_aten.view.default, _aten.permute.default, _aten.reshape.default, _aten._unsafe_view.default)
_PRODUCTS = (*sparse.PRODUCTS, torch.ops.bbvi_conv.sparse_product.default)


@torch.library.custom_op("bbvi_conv::joined", mutates_args=())
def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Vectors, one after the other."""
    return torch.cat(list(parts))


@_joined.register_fake
def _(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def mark(graph: GraphModule) -> None:
    """Let a vector of large products and small other parts be an operation of ours; does not recompile ``graph``."""
    for node in graph.graph.find_nodes(op="call_function", target=_aten.cat.default):
        parts, *rest = node.args
        values = [part.meta["val"] for part in parts]
        large = [part for part, value in zip(parts, values, strict=True) if value.numel() >= LARGE]
        alike = {(value.dim(), value.dtype) for value in values} == {(1, node.meta["val"].dtype)}
        if large and all(map(_of_product, large)) and alike and len({*parts}) == len(parts) and rest in ([], [0]):
            node.target, node.args = torch.ops.bbvi_conv.joined.default, (list(parts),)


def _of_product(node: Node) -> bool:
    """Whether this is a product of matrices as a vector, and nothing else reads it."""
    while len(node.users) == 1 and node.target in _SHAPES:
        node = node.args[0]  # type: ignore[assignment]
    return len(node.users) == 1 and node.target in _PRODUCTS


def settled(code: Sequence[Instruction | Pending], recorder: Recorder) -> list[Instruction | Pending]:
    """``code`` with each joined vector in place: what makes a part writes it there, other parts are copied."""
    found: list[Instruction | Pending] = []
    for step in code:
        if not isinstance(step, Call) or step.target != "bbvi_conv.joined.default":
            found.append(step)
            continue
        parts: Sequence[View] = step.args[0]
        (whole,) = step.results
        if all(part.stride == (1,) for part in parts):
            found += _copies(parts, whole, found, recorder)
        else:
            found.append(Call("aten.cat.out", (list(parts), 0), {"out": whole}, ()))
    return found


def _copies(
    parts: Sequence[View], whole: View, made: list[Instruction | Pending], recorder: Recorder
) -> list[Instruction | Pending]:
    """Copies of the parts that nothing could write in place; in ``made`` products now write the others."""
    copies: list[Instruction | Pending] = []
    offset = whole.place.offset
    for part in parts:
        target = Place(whole.place.slot, offset)
        number = _maker(part, made, recorder)
        if number is None:
            copies.append(Copy(part.place, target, part.nbytes, ""))
        else:
            product: Any = made[number]
            out = product.kwargs["out"]._replace(place=target)
            made[number] = dataclasses.replace(product, kwargs={**product.kwargs, "out": out})
        offset += part.nbytes
    return copies


def _maker(part: View, made: Sequence[Instruction | Pending], recorder: Recorder) -> int | None:
    """The product that was the last to touch the memory of a part, if it wrote the part and no more."""
    last = next((i for i in reversed(range(len(made))) if part.place.slot in _slots(made[i], recorder)), None)
    step = None if last is None else made[last]
    if not isinstance(step, Call) or step.target not in CALLS:
        return None
    out: View = step.kwargs["out"]
    rows, columns = out.size
    same = out.place == part.place and out.nbytes == part.nbytes and out.stride == (columns, 1)
    return last if same and part.size == (rows * columns,) else None


def _slots(step: Instruction | Pending, recorder: Recorder) -> set[int]:
    if isinstance(step, Pending):
        return {recorder.slot(t) for part in (step.carry, step.xs, step.fixed, step.results) for t in part}
    return {place.slot for place in places(step)}
