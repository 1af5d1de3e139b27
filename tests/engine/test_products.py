"""Products of matrices in generated code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bbvi_conv.engine.native import NativeLoop, blocks, routines, tiles
from bbvi_conv.engine.native.matrices import Matrix, Product
from bbvi_conv.engine.native.plan import Place, View
from bbvi_conv.program.aten_graph import to_graph


@pytest.fixture(params=["tiles", "blocks", "routines"])
def maker(request: pytest.FixtureRequest, generated: Callable[[], str], let_make: Callable[[str], None]) -> str:
    """Who makes the products."""
    let_make(request.param)
    return str(request.param)


Function = Callable[..., tuple[Tensor, ...]]


def plain(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (a @ b,)


def left_by_columns(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """As the gradient of a weight is."""
    return (a.T @ b,)


def right_by_columns(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (a @ b.T,)


def both_by_columns(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (a.T @ b.T,)


def part_of_rows(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Rows with gaps."""
    return (a[:, 3:] @ b[3:],)


def layer(a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (torch.addmm(bias, a, b.T),)


def layer_by_rows(a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (torch.addmm(bias, a, b),)


CASES: list[tuple[Function, list[tuple[int, ...]]]] = [
    (plain, [(128, 784), (784, 400)]),
    (plain, [(37, 1200), (1200, 31)]),  # several blocks of what is summed over
    (plain, [(700, 65), (65, 333)]),  # several blocks each way, none of them full
    (plain, [(1, 513), (513, 97)]),
    (left_by_columns, [(128, 400), (128, 784)]),
    (left_by_columns, [(128, 784), (128, 50)]),
    (right_by_columns, [(128, 784), (400, 784)]),
    (right_by_columns, [(640, 400), (784, 400)]),
    (both_by_columns, [(300, 129), (71, 300)]),
    (part_of_rows, [(65, 303), (303, 77)]),
    (layer, [(128, 784), (400, 784), (400,)]),
    (layer, [(640, 400), (75, 400), (75,)]),
    (layer_by_rows, [(128, 400), (400, 41), (41,)]),
]


def every(*given: Tensor) -> tuple[Tensor, ...]:
    """All cases, in one step."""
    rest = iter(given)
    return tuple(value for function, sizes in CASES for value in function(*(next(rest) for _ in sizes)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_products_are_those_of_torch(threads: int, maker: str) -> None:
    """Within rounding of the product in float64, by no call of torch's, at every step of a loop."""
    gen = torch.Generator().manual_seed(0)
    steps = [[torch.randn(size, generator=gen) for _, sizes in CASES for size in sizes] for _ in range(2)]
    loop = NativeLoop(to_graph(every, *steps[0]), steps[0], 0, len(steps[0]), threads=threads)
    loop.load()
    assert not loop._plan.calls()
    _, made = loop([], [torch.stack(moving) for moving in zip(*steps, strict=True)], 2)
    for step, given in enumerate(steps):
        for values, expected in zip(made, every(*(t.double() for t in given)), strict=True):
            torch.testing.assert_close(values[step].double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_products_of_other_numbers(dtype: torch.dtype, maker: str) -> None:
    """MKL's routines know float64 as well, and nobody but torch bfloat16."""
    given = [torch.randn(64, 64).to(dtype) for _ in range(2)]
    loop = NativeLoop(to_graph(plain, *given), given, 0, 2)
    loop.load()
    known = dtype is torch.float64 and routines.available()
    assert [call.target for call in loop._plan.calls()] == ([] if known else ["aten.mm.out"])
    _, (made,) = loop([], [t[None] for t in given], 1)
    torch.testing.assert_close(made[0], given[0] @ given[1])


def test_a_bias_that_all_columns_share(maker: str) -> None:
    """It is one number, of which generated code would read a row: torch adds it."""
    given = [torch.randn(64, 50), torch.randn(40, 50), torch.randn(1)]
    loop = NativeLoop(to_graph(layer, *given), given, 0, 3)
    loop.load()
    _, (made,) = loop([], [t[None] for t in given], 1)
    torch.testing.assert_close(made[0], layer(*given)[0], rtol=1e-4, atol=1e-4)


def test_without_mkl_they_stay_calls(generated: Callable[[], str], let_make: Callable[[str], None]) -> None:
    let_make("torch")
    given = [torch.randn(64, 64) for _ in range(2)]
    loop = NativeLoop(to_graph(plain, *given), given, 0, 2)
    loop.load()
    assert [call.target for call in loop._plan.calls()] == ["aten.mm.out"]
    _, (made,) = loop([], [t[None] for t in given], 1)
    torch.testing.assert_close(made[0], given[0] @ given[1])


SQUARE = [(200, 200), (200, 200)]


def test_tiles_keep_all_digits(generated: Callable[[], str], let_make: Callable[[str], None]) -> None:
    """Of numbers of all sizes, no larger an error than torch's float32; two parts of three would be 18 times worse."""
    let_make("tiles")
    gen = torch.Generator().manual_seed(0)
    given = [torch.randn(size, generator=gen) * torch.randn(size, generator=gen).mul(4).exp() for size in SQUARE]
    loop = NativeLoop(to_graph(plain, *given), given, 0, 2)
    loop.load()
    _, (made,) = loop([], [t[None] for t in given], 1)
    exact = given[0].double() @ given[1].double()
    size = given[0].double().abs() @ given[1].double().abs()  # what an error is relative to, sum by sum

    def error(product: Tensor) -> Tensor:
        return ((product.double() - exact) / size).square().mean().sqrt()

    halves = [t.bfloat16().float() + (t - t.bfloat16().float()).bfloat16().float() for t in given]
    assert error(made[0]) < 1.2 * error(given[0] @ given[1])
    assert error(halves[0] @ halves[1]) > 10 * error(made[0])


def test_which_products_are_large_enough_for_tiles() -> None:
    def of(m: int, n: int, k: int, dtype: str = "float32") -> Product:
        views = [View(Place(0, 0), dtype, size, (size[1], 1)) for size in ((m, k), (k, n), (m, n))]
        matrices = [matrix for matrix in map(Matrix.of, views) if matrix is not None]
        return Product(*matrices, None)

    assert tiles.fits(of(128, 784, 400))
    assert not tiles.fits(of(128, 784, 20))  # a sum of few
    assert not tiles.fits(of(128, 100, 300))
    assert not tiles.fits(of(128, 784, 400, "float64"))


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize(("vendor", "amd"), [("GenuineIntel", False), ("AuthenticAMD", True)])
def test_which_processors_blocks_are_for(vendor: str, amd: bool, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose maker is AMD, and of these those that can run them."""
    monkeypatch.setattr(blocks, "available", lambda: runs)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\nvendor_id\t: {vendor}\n")
    assert blocks.faster.__wrapped__() == (runs and amd)
