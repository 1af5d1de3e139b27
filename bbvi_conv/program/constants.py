"""What a graph computes from constants alone, as from data that every step sees whole, computed once."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from bbvi_conv.program.graph_module import constant

_aten: Any = torch.ops.aten

SMALL = 2**20
"""Bytes up to which a result is kept in any case; larger ones where they take no more than what they are made from."""

LARGE = 2**28
"""Bytes of an intermediate result above which nothing is computed ahead: a compiled step may never lay it out."""

_VIEWS = {
    *(_aten.reshape.default, _aten.expand.default, _aten.alias.default),
    *(_aten.unsqueeze.default, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.detach.default),
    *(_aten.t.default, _aten.permute.default, _aten.transpose.int, _aten.slice.Tensor, _aten.select.int),
}
"""Operations that compute nothing."""

_PARTS = (_aten.unsafe_split.Tensor, _aten.unsafe_split_with_sizes.default)
"""Operations that give views, and say that they do not."""

_BY_STRIDES = (_aten.as_strided.default, _aten.as_strided_copy.default)


def fold(graph: GraphModule, unsteady: Collection[Node]) -> None:
    """Keep the results of operations on constants as constants of the graph; changes ``graph``.

    What is ``unsteady``, as :func:`overwritten` tells, is no constant.

    Along dimensions in which a result repeats itself it is kept once, unless something reads it by its strides.
    """
    fixed = _fixed(graph, unsteady)
    by_strides = any(node.target in _BY_STRIDES for node in graph.graph.nodes)
    kept: list[Node] = []
    read: set[Node] = set()  # by what changes, if need be through views
    for node in reversed(graph.graph.nodes):
        if node not in fixed or not any(user not in fixed or user in read for user in node.users):
            continue
        if node.op == "call_function" and node.target in _VIEWS:
            read.add(node)
        elif node.op == "call_function" and node.all_input_nodes:
            kept.append(node)
    values: dict[Node, Tensor] = {}
    for node in reversed(kept):
        sources = above([node])
        made_from = sum(_bytes(n) for n in sources if n.op == "get_attr")
        if _bytes(node) > max(SMALL, made_from) or max(map(_bytes, sources)) > max(LARGE, made_from):
            continue
        with torch.no_grad():
            value = _value(graph, node, values)
        _replace(graph, node, value if by_strides else _once(value))


def _fixed(graph: GraphModule, unsteady: Collection[Node]) -> set[Node]:
    """Nodes whose values are the same in every run."""
    fixed: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            known = isinstance(getattr(graph, str(node.target), None), Tensor)
        else:
            known = node.op == "call_function" and _is_plain(node) and all(n in fixed for n in node.all_input_nodes)
        if known and node not in unsteady:
            fixed.add(node)
    return fixed


def overwritten(graph: GraphModule) -> set[Node]:
    """Nodes in whose memory something is written at some time, by whatever view of it."""
    owner: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        shared = node.op == "call_function" and not is_fresh(node) and isinstance(node.args[0], Node)
        owner[node] = owner[node.args[0]] if shared else node
    changed = {owner[node.args[0]] for node in graph.graph.nodes if changes(node)}
    return {node for node, whose in owner.items() if whose in changed}


def _is_plain(node: Node) -> bool:
    """Whether a node computes one tensor, the same every time, and changes none."""
    target, meta = node.target, node.meta.get("tensor_meta")
    if not isinstance(target, OpOverload) or target.namespace != "aten" or not hasattr(meta, "shape"):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def changes(node: Node) -> bool:
    """Whether an operation writes to what it is given."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def is_fresh(node: Node) -> bool:
    """Whether nothing else lies in the memory of what the node gives."""
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, Node) and source.target in _PARTS:
        whole, same = source.args[0], [user for user in source.users if user.args[1] == node.args[1]]
        return len(same) == 1 and isinstance(whole, Node) and len(whole.users) == 1 and is_fresh(whole)
    if not isinstance(node.target, OpOverload) or node.target in _PARTS:
        return False
    return all(returned.alias_info is None for returned in node.target._schema.returns)


def _value(graph: GraphModule, node: Node, values: dict[Node, Tensor]) -> Tensor:
    """The value of a fixed node; ``values`` holds those that are known, and gets the others."""
    pending = [node]
    while pending:
        last = pending[-1]
        missing = [n for n in last.all_input_nodes if n not in values]
        if last in values or not missing:
            pending.pop()
            if last.op == "get_attr":
                values[last] = getattr(graph, str(last.target)).detach()
            elif last not in values:
                args, kwargs = torch.fx.map_arg((last.args, last.kwargs), values.__getitem__)
                values[last] = last.target(*args, **kwargs)  # type: ignore[operator]
        pending += missing
    return values[node]


def _bytes(node: Node) -> int:
    kind = node.meta["tensor_meta"]
    return torch.Size(kind.shape).numel() * int(kind.dtype.itemsize)


def above(nodes: Iterable[Node]) -> set[Node]:
    """Nodes, and all that they are computed from."""
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _once(value: Tensor) -> Tensor:
    """The value without its repetitions."""
    for dim, size in enumerate(value.shape):
        first = value.narrow(dim, 0, 1) if size > 1 else value
        if size > 1 and torch.equal(first.expand_as(value), value):
            value = first
    return value


def _replace(graph: GraphModule, node: Node, value: Tensor) -> None:
    kind = node.meta["tensor_meta"]
    with graph.graph.inserting_before(node):
        new = constant(graph, value.clone(), f"folded_{len(graph.graph.nodes)}_{node.name}")
        if value.shape != kind.shape:
            new = graph.graph.call_function(_aten.expand.default, (new, list(kind.shape)))
            new.meta["tensor_meta"] = kind
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
