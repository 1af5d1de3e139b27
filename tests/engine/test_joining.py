"""The vector of all gradients: what a product of matrices gives is not copied into it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bbvi_conv.engine.native import NativeLoop, joining
from bbvi_conv.program.aten_graph import to_graph

SIZES = [(50, 300), (50, 400), (300,), (400,)]


def gradients(x: Tensor, g: Tensor, _: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Of two layers, as torch gives them: a product turned and turned back, and sums beside it."""
    parts = [(x.T @ g).T.T, g.sum(0), g.T @ x, b]
    return (torch.cat([part.reshape(-1) for part in parts]) * 2,)


def read_twice(x: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    """What something else reads as well, or the vector itself, stays where it is."""
    weight = x.T @ g
    once, twice = weight.reshape(-1), (g.T @ x).reshape(-1)
    return torch.cat([once, twice, twice]), weight.abs()


def of_large_sums(x: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """A large part that is no product: Inductor writes it in place, and copies the product."""
    return (torch.cat([(x.T @ g).reshape(-1), (a[:, None] + b).reshape(-1)]),)


def repeated(x: Tensor, g: Tensor, a: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    """A part that is one number many times over."""
    return (torch.cat([(x.T @ g).reshape(-1), a[:1].expand(300)]),)


@pytest.mark.parametrize("maker", ["torch", "tiles", "blocks", "routines"])
@pytest.mark.parametrize(("function", "joined"), [(gradients, 1), (read_twice, 0), (of_large_sums, 0), (repeated, 1)])
def test_vectors_are_those_of_torch(
    function: Callable[..., tuple[Tensor, ...]],
    joined: int,
    maker: str,
    generated: Callable[[], str],
    let_make: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At every step, whether torch makes the products or generated code does."""
    let_make(maker)
    marked: list[int] = []
    mark = joining.mark

    def counted(graph: torch.fx.GraphModule) -> None:
        mark(graph)
        target = torch.ops.bbvi_conv.joined.default
        marked.append(len(graph.graph.find_nodes(op="call_function", target=target)))

    monkeypatch.setattr(joining, "mark", counted)
    gen = torch.Generator().manual_seed(0)
    steps = [[torch.randn(size, generator=gen) for size in SIZES] for _ in range(2)]
    loop = NativeLoop(to_graph(function, *steps[0]), steps[0], 0, len(SIZES))
    loop.load()
    assert marked == [joined]
    _, made = loop([], [torch.stack(moving) for moving in zip(*steps, strict=True)], 2)
    for step, given in enumerate(steps):
        for values, expected in zip(made, function(*given), strict=True):
            torch.testing.assert_close(values[step], expected, rtol=1e-5, atol=1e-4)


def test_a_large_part_is_made_in_place(generated: Callable[[], str], let_make: Callable[[str], None]) -> None:
    """Both products write to the vector, one after the other and past the sums between them."""
    let_make("torch")
    given = [torch.randn(size) for size in SIZES]
    loop = NativeLoop(to_graph(gradients, *given), given, 0, len(SIZES))
    loop.load()
    outs = [call.kwargs["out"].place for call in loop._plan.calls()]
    assert len(outs) == 2
    assert outs[0].slot == outs[1].slot
    assert abs(outs[1].offset - outs[0].offset) == 4 * (300 * 400 + 400)
