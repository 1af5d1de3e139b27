"""ATen graphs on their way to compiled code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

NARROW = 64
"""Columns up to which a tall constant matrix is kept columns first: its rows then fill whole vectors."""


def results(graph: GraphModule) -> list[Any]:
    """Shape and dtype of each result, as tracing saw them."""
    (made,) = graph.graph.output_node().args
    assert isinstance(made, (list, tuple))
    return [node.meta["tensor_meta"] for node in made if isinstance(node, Node)]


def lift(graph: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """The graph with its constant tensors as further inputs, after the others, and the constants.

    Constant scalars are written into the graph, where they fold.
    """
    inner = Graph()
    known: dict[Node, Node] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        known[node] = inner.node_copy(node)
    lifted: dict[str, Node] = {}
    constants: list[Tensor] = []
    for node in graph.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = getattr(graph, name)
        if name not in lifted and value.dim():
            lifted[name] = inner.placeholder(f"constant_{len(constants)}")
            constants.append(_columns_first(value.detach()))
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op != "get_attr":
            known[node] = inner.node_copy(node, known.__getitem__)
        elif str(node.target) in lifted:
            known[node] = lifted[str(node.target)]
        else:
            value = getattr(graph, str(node.target))
            full = torch.ops.aten.full.default
            known[node] = inner.call_function(full, ([], value.item()), {"dtype": value.dtype})
    return GraphModule(graph, inner), constants


def gather_inputs(graph: GraphModule, first: int, count: int) -> GraphModule:
    """The graph whose ``count`` inputs from ``first`` on are gathered by row from the whole data.

    Its inputs are those before them, the rows, and the data.
    """
    inner = Graph()
    known: dict[Node, Node] = {}
    given = list(graph.graph.find_nodes(op="placeholder"))
    for node in given[:first]:
        known[node] = inner.node_copy(node)
    rows = inner.placeholder("rows")
    whole = [inner.placeholder(f"whole_{i}") for i in range(count)]
    for node, data in zip(given[first:], whole, strict=True):
        known[node] = inner.call_function(torch.ops.aten.index.Tensor, (data, [rows]))
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            known[node] = inner.node_copy(node, known.__getitem__)
    return GraphModule(graph, inner)


def _columns_first(value: Tensor) -> Tensor:
    if value.dim() == 2 and value.shape[1] <= NARROW and value.shape[0] >= 4 * value.shape[1]:
        return value.t().contiguous().t()
    return value.contiguous()
