"""Tensors around a function are found wherever it finds them, and are what they were afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bbvi_conv.program.surroundings import surroundings

NET = nn.Linear(1, 1, bias=False)
WEIGHT = nn.Parameter(torch.tensor([5.0]))
FIXED = torch.tensor([7.0])


class Owner:
    """An object with a tensor, a module and a method, and with a value that it computes once."""

    def __init__(self) -> None:
        self.tensor, self.net = torch.tensor([2.0]), nn.Linear(1, 1, bias=False)

    def __call__(self, x: Tensor) -> Tensor:
        self.twice = self.tensor * 2
        return self.net(x) + self.twice


class Network(nn.Module):
    """With a tensor that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.tensor = nn.Parameter(torch.tensor([3.0])), torch.tensor([2.0])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.tensor


def by_the_file(x: Tensor) -> Tensor:
    return helper(x) + FIXED


def helper(x: Tensor) -> Tensor:
    return NET(x) * WEIGHT


def of_cells() -> Callable[[Tensor], Tensor]:
    parts = {"a": [torch.tensor([1.0])], "net": nn.Linear(1, 1, bias=False)}
    inner = lambda x: parts["net"](x) + parts["a"][0]  # type: ignore[operator,index]  # noqa: E731
    return lambda x: inner(x) * 2


def with_a_hole() -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        return later + x if x.numel() == 0 else first * x

    first = torch.tensor([3.0])
    if first.numel() == 0:
        later = first
    return function


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "file": (by_the_file, 2),
    "cells": (of_cells(), 2),
    "method": (Owner().__call__, 2),
    "partial": (functools.partial(lambda owner, x: owner(x), Owner()), 2),
    "module": (Network(), 2),
    "hole": (with_a_hole(), 1),
}
"""By where it finds them: a function, and how many tensors."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_others_stand_in_for_a_while(name: str) -> None:
    function, count = FUNCTIONS[name]
    x = torch.tensor([[3.0]])
    found, others = surroundings(function)
    assert len(found) == count
    before = function(x)
    with others([torch.full_like(t, 10.0) for t in found]):
        inside = function(x)
    assert not torch.allclose(inside, before)  # power
    assert torch.equal(function(x), before)
    with pytest.raises(ZeroDivisionError), others([torch.zeros_like(t) for t in found]):
        raise ZeroDivisionError
    assert torch.equal(function(x), before)
    assert all(isinstance(p, nn.Parameter) for p in NET.parameters())


def test_what_an_object_notes_meanwhile_is_forgotten() -> None:
    owner = Owner()
    found, others = surroundings(owner.__call__)
    with others(found):
        owner(torch.ones(1, 1))
    assert not hasattr(owner, "twice")
