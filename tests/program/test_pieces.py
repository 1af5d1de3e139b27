"""Tensors put together from many entries of few others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.graphs import simplify
from bbvi_conv.program.pieces import taken

X = torch.arange(48.0).reshape(6, 8) + 0.5
aten = torch.ops.aten


def rows(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.stack([x[i].reshape(2, 4) for i in range(1, 6)] + [x[0].reshape(2, 4)] * 3),)


def columns(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat([*x.t().unbind(0), x[2:3, 1:5].reshape(-1)]),)


def split(x: Tensor) -> tuple[Tensor, ...]:
    """As parameters leave a vector and their gradients come back to it."""
    parts = torch.split(x.reshape(-1), [1, 2] * 16)
    return torch.cat([p * 1.0 for p in parts[::2]]), torch.cat([part.reshape(-1) for part in parts])


def two(x: Tensor) -> tuple[Tensor, ...]:
    a, b = x.sin().reshape(-1), x.cos().reshape(-1)
    return (torch.stack([part for i in range(48) for part in (a[i], b[i])]).reshape(48, 2),)


def whole(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat([x[i] for i in range(6)] + [x.sin()[j] for j in range(6)], 0),)


@pytest.mark.parametrize("function", [rows, columns, split, two, whole])
def test_what_is_put_together_is_one_look_up(function) -> None:
    graph = to_graph(function, X, functional=False)
    before = len(graph.graph.nodes)
    simplify(graph)
    assert len(graph.graph.nodes) < before / 2
    for made, expected in zip(graph(X), function(X), strict=True):
        assert torch.equal(made, expected)
    other = X.flip(0).contiguous()
    for made, expected in zip(graph(other), function(other), strict=True):
        assert torch.equal(made, expected)


@pytest.mark.parametrize(
    ("places", "targets"),
    [
        (torch.arange(48), set()),
        (torch.arange(4, 20), {aten.slice.Tensor}),
        (torch.arange(4, 20, 3).reshape(2, 3), {aten.slice.Tensor, aten.reshape.default}),
        (torch.tensor([3, 1, 2]), {aten.index.Tensor}),
        (torch.tensor([5, 5, 5]), {aten.index.Tensor}),
        (torch.tensor([7]), {aten.slice.Tensor}),
    ],
)
def test_entries_at_equal_distances_are_a_slice(places: Tensor, targets: set[object]) -> None:
    graph = simplify(to_graph(lambda x: (taken(x, places),), X.reshape(-1), functional=False))
    found = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert found == targets
    assert torch.equal(graph(X.reshape(-1))[0], X.reshape(-1)[places])


def test_parts_of_too_many_tensors_stay() -> None:
    def apart(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.stack([(x * i).sum() for i in range(12)]),)

    graph = simplify(to_graph(apart, X, functional=False))
    (put,) = [node for node in graph.graph.nodes if node.target in (aten.stack.default, aten.cat.default)]
    assert len(put.all_input_nodes) == 12
    torch.testing.assert_close(graph(X), apart(X))


def test_rows_of_a_scan_put_together_are_those_rows() -> None:
    """As a loop in Python that became one leaves its results."""

    def listed(x: Tensor) -> tuple[Tensor, ...]:
        _, rows = bc.scan(lambda s, row: (s + row, s * row), x[0], x)
        return (torch.stack([rows[t] for t in range(6)] + [rows[0], rows[1]]),)

    def same(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.stack(list(bc.scan(lambda s, row: (s + row, s * row), x[0], x.repeat(2, 1))[1].unbind(0))),)

    assert aten.stack.default not in {node.target for node in simplify(to_graph(listed, X)).graph.nodes}
    graph = simplify(to_graph(same, X))
    assert len(graph.graph.nodes) < 9
    assert torch.equal(graph(X)[0], same(X)[0])
    assert torch.equal(simplify(to_graph(listed, X))(X)[0], listed(X)[0])
