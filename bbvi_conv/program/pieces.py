"""Tensors put together from many entries of few others: one look-up, or a slice, in place of as many operations.

A model that handles sites, parameters or data one by one in a Python loop takes them out of vectors and puts them into
vectors again.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from bbvi_conv.program.graph_module import constant

_aten: Any = torch.ops.aten

MANY = 8
"""Parts from which they are taken together."""

LARGE = 2**22
"""Entries of a tensor whose places are not listed."""

VIEWS = {
    *(_aten.reshape.default, _aten.view.default, _aten.unsqueeze.default, _aten.squeeze.default, _aten.squeeze.dim),
    *(_aten.slice.Tensor, _aten.select.int, _aten.permute.default, _aten.transpose.int, _aten.t.default),
    *(_aten.unbind.int, _aten.split_with_sizes.default, _aten.split.Tensor, operator.getitem),
}
"""Operations that give entries of their first argument, each at most once."""


class Entries(NamedTuple):
    """Some entries of a tensor: of which node, and their places in it, laid out in the shape of what is given."""

    source: Node
    places: Tensor


class Pieces:
    """Which entries of which other node the nodes of a graph are."""

    def __init__(self) -> None:
        self._known: dict[Node, tuple[Node, Any]] = {}

    def of(self, node: Node) -> Entries | None:
        """The entries that a node is of the one it comes from by views; None where that is large or no tensor."""
        pending = [node]
        while pending[-1] not in self._known and _is_view(pending[-1]):
            pending.append(pending[-1].args[0])  # type: ignore[arg-type]
        for one in reversed(pending):
            if one in self._known:
                continue
            if _is_view(one):
                source, places = self._known[one.args[0]]  # type: ignore[index]
                self._known[one] = source, one.target(places, *one.args[1:], **one.kwargs)  # type: ignore[operator]
            else:
                kind = one.meta.get("tensor_meta")
                if kind is None or kind.shape.numel() > LARGE:
                    return None
                self._known[one] = one, torch.arange(kind.shape.numel()).reshape(kind.shape)
        source, places = self._known[node]
        return Entries(source, places) if isinstance(places, Tensor) else None


def _is_view(node: Node) -> bool:
    """Whether a node gives entries of its first argument, and not one of several results of something else."""
    return node.target in VIEWS and (node.target is not operator.getitem or node.args[0].target in VIEWS)  # type: ignore[union-attr]


class Step(NamedTuple):
    """An operation on the result of the one before: what follows its first argument, and the shape of what it gives."""

    target: Any
    more: tuple[Any, ...]
    shape: torch.Size


def steps(size: int, places: Tensor) -> list[Step]:
    """What takes entries of a vector of that size, in the shape of their ``places``: slices where they can do it.

    With places in one dimension the same takes rows of a tensor of so many.
    """
    index = places.reshape(-1)
    first, count = int(index[0]), len(index)
    step = int(index[1]) - first if count > 1 else 1
    found = []
    if step < 1 or not torch.equal(index, first + step * torch.arange(count)):
        found.append(Step(_aten.index.Tensor, ([index],), index.shape))
    elif (first, step, count) != (0, 1, size):
        found.append(Step(_aten.slice.Tensor, (0, first, int(index[-1]) + 1, step), index.shape))
    if places.shape != index.shape:
        found.append(Step(_aten.reshape.default, (list(places.shape),), places.shape))
    return found


def taken(flat: Tensor, places: Tensor) -> Tensor:
    """Entries of a vector, in the shape of their ``places``; or rows of a tensor, whose places have one dimension."""
    device = flat.device
    for step in steps(len(flat), places):
        more = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, step.more)
        flat = step.target(flat, *more)
    return flat


def joined(graph: GraphModule, node: Node, pieces: Pieces) -> Node | None:
    """What puts many entries of few tensors together, as one look-up; None where a node is no such thing."""
    if node.target not in (_aten.cat.default, _aten.stack.default) or node.kwargs:
        return None
    parts: Sequence[Node] = node.args[0]  # type: ignore[assignment]
    found = [pieces.of(part) for part in parts] if len(parts) >= MANY else []
    known = [part for part in found if part is not None]
    kinds = {part.source: part.source.meta["tensor_meta"] for part in known}
    sizes = [kind.shape.numel() for kind in kinds.values()]
    if not kinds or len(known) < len(found) or len(kinds) > len(parts) // 4 or 0 in sizes:
        return None
    if len({kind.dtype for kind in kinds.values()}) > 1:
        return None
    starts = dict(zip(kinds, itertools.accumulate(sizes, initial=0), strict=False))
    put = torch.cat if node.target is _aten.cat.default else torch.stack
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    places = put([starts[part.source] + part.places for part in known], dim)

    def call(target: Any, shape: Sequence[int], *args: Any) -> Node:
        made = graph.graph.call_function(target, args)
        made.meta["tensor_meta"] = node.meta["tensor_meta"]._replace(shape=torch.Size(shape))
        return made

    device = node.meta["tensor_meta"].device

    def known_to_graph(value: Any) -> Any:
        return constant(graph, value.to(device), f"places_of_{node.name}") if isinstance(value, Tensor) else value

    with graph.graph.inserting_before(node):
        flat = [call(_aten.reshape.default, [size], source, [size]) for source, size in zip(kinds, sizes, strict=True)]
        made = call(_aten.cat.default, [sum(sizes)], flat) if len(flat) > 1 else flat[0]
        for step in steps(sum(sizes), places):
            made = call(step.target, step.shape, made, *tree_map(known_to_graph, step.more))
    return made
