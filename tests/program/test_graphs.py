"""Fewer operations for the same function."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bbvi_conv.program.graphs import simplify
from bbvi_conv.program.trace import to_graph


def fresh(x: Tensor) -> tuple[Tensor, ...]:
    """As torch writes 1 - x in the derivative of silu."""
    return (torch.empty_like(x).fill_(1).sub_(x) * x, x.exp().mul_(2).add_(x))


def shared(x: Tensor) -> tuple[Tensor, ...]:
    """What a view of it reads, a copy keeps, and another of the same kind does not see."""
    changed, other = torch.zeros_like(x), torch.zeros_like(x)
    row, copy = changed.view(-1), changed.clone()
    changed.add_(x)
    return row, copy, other, copy.add_(1)


def part_filled(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of what is read as a whole; and something new as a whole."""
    changed = x.exp()
    changed[0].fill_(2.0)
    changed[1, 1:].zero_()
    changed[1, 0].fill_(x.sum())
    return (changed * torch.empty_like(x).fill_(3.0),)


@pytest.mark.parametrize(("function", "left"), [(fresh, 0), (shared, 1), (part_filled, 3)])
def test_what_changes_memory_that_nothing_else_reads_gives_anew(
    function: Callable[[Tensor], tuple[Tensor, ...]], left: int
) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    graph = to_graph(function, x, functional=False)

    def changing() -> int:
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        return sum(target._schema.is_mutable for target in targets)

    assert changing() > left
    simplify(graph)
    assert changing() == left
    for ours, expected in zip(graph(x), function(x), strict=True):
        assert torch.equal(ours, expected)


def filled(x: Tensor) -> tuple[Tensor, ...]:
    """As torch writes the derivative of silu, and a sum that begins with nothing."""
    return (torch.empty_like(x).fill_(1).sub_(x) * x, torch.empty_like(x).zero_().add_(x))


def test_what_is_filled_is_mapped_without_a_loop(capfd: pytest.CaptureFixture[str]) -> None:
    """torch says so on stderr where it maps an operation one by one, which is slow."""
    x = torch.arange(6.0).reshape(2, 3)
    graph = simplify(to_graph(filled, x, functional=False))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = torch.func.vmap(graph)(x)
    assert not said
    assert "batching rule" not in capfd.readouterr().err
    for ours, expected in zip(made, filled(x), strict=True):
        assert torch.equal(ours, expected)
