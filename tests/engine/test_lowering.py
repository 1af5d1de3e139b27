"""What generated code does not do at every number: divide, or gather and compute what it has computed before."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bbvi_conv.engine.native import NativeLoop
from bbvi_conv.program.aten_graph import to_graph


def kernels(function: Callable[..., tuple[Tensor, ...]], given: list[Tensor], generated: Callable[[], str]) -> str:
    """Text of the kernels of a function whose only result replaces its first input, which they are held to."""
    loop = NativeLoop(to_graph(function, *given), given, 1, 0)
    loop.load()
    (made,), _ = loop(given[:1], [], 1)
    torch.testing.assert_close(made, function(*given)[0])
    text = generated()
    return text[text.index("static void") : text.index("static int step")]


def flat_gradient(weight: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """The gradient of a linear layer beside another, in one vector."""
    return (torch.cat([(g[:, None] @ x[None]).view(-1), (x[:, None] @ g[None]).view(-1)]) + weight,)


def scaled(carry: Tensor, count: Tensor, by: Tensor) -> tuple[Tensor, ...]:
    """Divisions by numbers that are computed, as Adam's are; and by an array."""
    return (carry / (1 + count) + by / (1 - count) + carry / (2 + by * by),)


@pytest.mark.parametrize(
    ("function", "sizes", "divisions"), [(flat_gradient, [(800,), (20,), (20,)], 0), (scaled, [(33,), (), (33,)], 1)]
)
def test_divisions_are_few(function, sizes, divisions: int, generated: Callable[[], str]) -> None:
    gen = torch.Generator().manual_seed(0)
    body = kernels(function, [0.1 + torch.rand(size, generator=gen) for size in sizes], generated)
    assert "div_floor" not in body
    once = body.split("C10_UNLIKELY")[0]  # what is left over when vectors are full is the same again
    one = r"(tmp\d+) = static_cast<(?:float>\(1\.0\)|int32_t>\(1\));"  # of reciprocals; torch 2.11: an int
    ones = re.findall(one, once)
    assert len([above for above in re.findall(r"= (tmp\d+) / tmp\d+;", once) if above not in ones]) == divisions


def bounded(weight: Tensor, norm: Tensor) -> tuple[Tensor, ...]:
    """A large matrix times a power of a number that is computed."""
    return (weight * (norm * norm + 256.0) ** -0.25 + weight,)


def test_a_function_of_a_single_number_is_not_computed_for_every_number(generated: Callable[[], str]) -> None:
    body = kernels(bounded, [torch.randn(100, 64), torch.tensor(3.0)], generated)
    assert body.count("std::pow") == 1
    assert body.index("std::pow") < body.index("for(")


def of_seeds(params: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """32 seeds beside each other: an intercept of each, between its other parameters, meets 500 rows."""
    return (torch.exp(rows + params[:, 0] * params[:, 1]),)


def linear(params: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """A product of rows with numbers that are computed."""
    return (rows @ params[:, 0].exp(),)


@pytest.mark.parametrize(("function", "dear"), [(of_seeds, r"22L\*x0"), (linear, r"exp\(")])
def test_what_many_numbers_share_is_laid_out_before(function, dear: str, generated: Callable[[], str]) -> None:
    """Gathered from every 22nd place, or computed, once, and not for each of the rows."""
    given = [torch.randn(32, 22), torch.randn(500, 32)]
    loop = NativeLoop(to_graph(function, *given), given, 0, 2)
    loop.load()
    _, (made,) = loop([], [t[None] for t in given], 1)
    torch.testing.assert_close(made[0], function(*given)[0])
    before, over_rows = generated().split("<static_cast<int64_t>(500L)", 1)
    assert re.search(dear, before)
    assert not re.search(dear, over_rows)


def running(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Running sums and products along either dimension, as stick-breaking has them."""
    return (x.cumsum(-1) * (1 + y).cumprod(-1) + y.cumsum(0).exp() + (x > 0).cumsum(-1),)


@pytest.mark.parametrize(("size", "calls"), [(5, 0), (40, 3)])
def test_short_running_sums_are_no_calls(size: int, calls: int, generated: Callable[[], str]) -> None:
    gen = torch.Generator().manual_seed(0)
    given = [torch.rand(4, size, generator=gen, dtype=torch.float64) - 0.5 for _ in range(2)]
    loop = NativeLoop(to_graph(running, *given), given, 1, 0)
    loop.load()
    (made,), _ = loop(given[:1], [], 1)
    torch.testing.assert_close(made, running(*given)[0])
    assert len(loop._calls) == calls


BASE = torch.arange(12.0, dtype=torch.float64)


def test_constants_that_share_memory() -> None:
    given = [torch.linspace(0.0, 1.0, 8, dtype=torch.float64)]
    first, second = BASE[:8], BASE[4:]

    def windows(x: Tensor) -> tuple[Tensor, ...]:
        return (x * first + second,)

    loop = NativeLoop(to_graph(windows, *given), given, 1, 0)
    loop.load()
    (made,), _ = loop(given, [], 1)
    torch.testing.assert_close(made, windows(*given)[0])


def beside_diagonals(x: Tensor, y: Tensor, by: Tensor) -> tuple[Tensor, ...]:
    """Numbers on the diagonals of matrices of one, as the gradient of a determinant has them; others from the same."""
    placed = torch.diagonal_scatter(torch.zeros_like(x)[..., None, None], (y * y).sum(-1, True) + by, 0, -2, -1)
    more = y.sum(-1) * by[..., 0]
    return (placed[..., 0, 0] + more + more.exp() + y.prod(-1),)


def test_what_is_written_in_place_is_read_afterwards() -> None:
    gen = torch.Generator().manual_seed(0)
    given = [torch.rand(size, generator=gen) for size in ((10, 2), (10, 2, 6), (10, 1, 1))]
    loop = NativeLoop(to_graph(beside_diagonals, *given), given, 1, 0)
    loop.load()
    (made,), _ = loop(given[:1], [], 1)
    torch.testing.assert_close(made, beside_diagonals(*given)[0])
