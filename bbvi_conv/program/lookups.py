"""Look-ups of entries in their order, as by all values of an enumerated latent: slices, which need no index.

They cost a loop of their own each, and so do their gradients. And torch's Inductor, which writes such an index as an
expression, may then add to a gradient and read it in one loop, where it reads it as it was before.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_aten: Any = torch.ops.aten

_ZEROS = (_aten.new_zeros.default, _aten.zeros.default, _aten.zeros_like.default)
_KEEPS = {
    *(_aten.reshape.default, _aten.unsqueeze.default),
    *(_aten.squeeze.default, _aten.squeeze.dim, _aten.clone.default, _aten.detach.default, _aten.alias.default),
    *(_aten.lift_fresh_copy.default, _aten.expand.default),
}
"""Operations that leave numbers in their order, where they leave as many."""


def without_lookup(graph: GraphModule, node: Node) -> Node | None:
    """What a look-up of entries in their order gives, or its gradient, as a new node; None where a node is neither."""
    if node.target is _aten.index.Tensor:
        source, indices = node.args
        given = source
    elif node.target is _aten.index_put.default and node.args[3:] == (True,):
        source, indices, given = node.args[:3]
        if not isinstance(source, Node) or source.target not in _ZEROS:
            return None
    else:
        return None
    around, shape = _shape(source), _shape(node)
    used = [(at, index) for at, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
    if around is None or shape is None or len(used) != 1 or _shape(given) is None:
        return None
    at, index = used[0]
    entries = _entries(graph, index)
    if entries is None or entries.start < 0 or entries.stop > around[at]:
        return None
    part = (*around[:at], len(entries), *around[at + 1 :])
    if _shape(given) != (around if given is source else _looked_up(around, at, _shape(index))):
        return None
    after = around[at] - entries.stop
    with graph.graph.inserting_before(node):
        if given is source:
            if len(entries) < around[at]:
                given = graph.graph.call_function(_aten.slice.Tensor, (given, at, entries.start, entries.stop))
            made = graph.graph.call_function(_aten.reshape.default, (given, list(shape)))
        else:
            made = graph.graph.call_function(_aten.reshape.default, (given, list(part)))
            if len(entries) < around[at]:
                beside = [0, 0] * (len(around) - at - 1) + [entries.start, after]
                made = graph.graph.call_function(_aten.constant_pad_nd.default, (made, beside, 0.0))
    made.meta["tensor_meta"] = node.meta["tensor_meta"]
    return made


def _looked_up(around: tuple[int, ...], at: int, index: tuple[int, ...] | None) -> tuple[int, ...]:
    return (*around[:at], *(index or ()), *around[at + 1 :])


def _shape(node: Any) -> tuple[int, ...] | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None) if isinstance(node, Node) else None
    return None if shape is None else tuple(shape)


def _entries(graph: GraphModule, node: Any) -> range | None:
    """The whole numbers that follow each other in a constant; None where it holds others."""
    if not isinstance(node, Node):
        return None
    if node.op == "get_attr":
        value = getattr(graph, str(node.target), None)
        if not isinstance(value, Tensor) or value.dtype is not torch.int64 or value.numel() == 0:
            return None
        found = range(int(value.reshape(-1)[0]), int(value.reshape(-1)[0]) + value.numel())
        counted = torch.arange(found.start, found.stop, device=value.device)
        return found if torch.equal(value.reshape(-1), counted) else None
    if node.target in (_aten.arange.default, _aten.arange.start) and all(isinstance(n, int) for n in node.args):
        return range(*node.args)  # type: ignore[arg-type]
    if node.target in _KEEPS:
        kept, source = _shape(node), _shape(node.args[0])
        same = kept is not None and source is not None and math.prod(kept) == math.prod(source)
        return _entries(graph, node.args[0]) if same else None
    return None
