"""Products with data that are mostly zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from bbvi_conv.engine.native import NativeLoop, routines, sparse
from bbvi_conv.program.aten_graph import to_graph

Function = Callable[..., tuple[Tensor, ...]]


def zeros_and_more(*size: int, share: float = 0.13, seed: int = 0) -> Tensor:
    """So large a share of the numbers is normal, the others are zero."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=gen) * (torch.rand(size, generator=gen) < share)


def layer(x: Tensor, w: Tensor, b: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    """As it is, its weight by columns."""
    return (torch.addmm(b, x, w.T),)


def plain(x: Tensor, w: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    """The other by rows."""
    return (x @ w.T.contiguous(),)


def weight_gradient(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """As torch gives it: the data on the right, a part of a longer vector."""
    return (torch.cat([(rest[2].T @ x).reshape(-1), rest[1]]) * 2,)


def gradient_by_columns(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """The other operand by columns, the data on either side."""
    g = rest[2].T.contiguous()
    return g @ x, x.T @ g.T


def turned(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """The data by columns, on the left."""
    return (x.T @ rest[2],)


FUNCTIONS: list[Function] = [layer, plain, weight_gradient, gradient_by_columns, turned]
SIZES = [(128, 784, 400), (100, 1001, 67), (131, 333, 129), (37, 4099, 33)]
"""Rows, columns of the data, and columns of the product: most of them fill no whole vectors, tiles or blocks."""


def looped(
    function: Function, example: Sequence[Tensor], resident: Sequence[Tensor], threads: int = 1
) -> tuple[NativeLoop, GraphModule]:
    """A loop whose first inputs move and whose last is rows of the data, and its graph."""
    graph = to_graph(function, *example)
    moving = len(example) - len(resident)
    loop = NativeLoop(graph, example, 0, moving, resident=resident, threads=threads)
    loop.load()
    return loop, loop._graph


def marked(graph: GraphModule) -> int:
    """How many products skip zeros."""
    return len(graph.graph.find_nodes(op="call_function", target=torch.ops.bbvi_conv.sparse_product.default))


pytestmark = pytest.mark.usefixtures("generated")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_products_are_the_dense_ones(size: tuple[int, int, int], threads: int) -> None:
    """Within rounding of the product in float64, for other rows at every step, in all layouts."""
    rows, columns, out = size
    data, steps = zeros_and_more(5 * rows, columns), 3
    gen = torch.Generator().manual_seed(1)
    moving = [torch.randn((steps, *shape), generator=gen) for shape in ((out, columns), (out,), (rows, out))]
    drawn = torch.randint(len(data), (steps, rows), generator=gen)

    def every(w: Tensor, b: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for function in FUNCTIONS for value in function(x, w, b, g))

    loop, graph = looped(every, [*(m[0] for m in moving), data[:rows]], [data], threads)
    assert marked(graph) == 6
    assert routines.available() <= (not loop._plan.calls())
    _, made = loop([], moving, steps, drawn)
    for step in range(steps):
        given = [*(m[step].double() for m in moving), data[drawn[step]].double()]
        for values, expected in zip(made, every(*given), strict=True):
            torch.testing.assert_close(values[step].double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_bytes_and_what_is_made_of_them() -> None:
    """Pixels as they are kept, and numbers that follow from them alone, such as pixels divided by 255."""
    images = (zeros_and_more(200, 784).abs() * 100).to(torch.uint8)
    w = torch.randn(784, 64)

    def scaled(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return ((x.float() / 255).reshape(len(x), 2, 392).flatten(1) @ w,)

    loop, graph = looped(scaled, [w, images[:64]], [images])
    assert marked(graph) == 1
    _, (made,) = loop([], [w[None]], 1, torch.arange(64)[None])
    torch.testing.assert_close(made[0], scaled(w, images[:64])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reason", ["dense", "shifted", "not data", "small", "float64", "half of it zero", "too large"])
def test_which_products_stay_dense(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    share = {"dense": 1.0, "half of it zero": 0.5}.get(reason, 0.1)
    rows = 2 if reason == "small" else 64
    if reason == "too large":
        monkeypatch.setattr(sparse, "MOST", 64 * 784 - 1)
        monkeypatch.setattr(sparse, "_value", lambda *_: pytest.fail("what is too large is not even computed"))
    dtype = torch.float64 if reason == "float64" else torch.float32
    data = zeros_and_more(300, 784, share=share).to(dtype)
    w, z = torch.randn(784, 64, dtype=dtype), data[:rows].clone()

    def function(w: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return ((x + 1 if reason == "shifted" else z if reason == "not data" else x) @ w,)

    loop, graph = looped(function, [w, z, data[:rows]], [data])
    assert marked(graph) == 0
    _, (made,) = loop([], [w[None], z[None]], 1, torch.arange(rows)[None])
    torch.testing.assert_close(made[0], function(w, z, data[:rows])[0])


def test_a_sample_is_taken_from_everywhere() -> None:
    """The first rows are dark, the others are not: the product stays dense, and is right for either."""
    data = torch.cat([zeros_and_more(100, 784), torch.randn(900, 784)])
    assert marked(looped(lambda w, x: (x @ w,), [torch.randn(784, 64), data[:64]], [data])[1]) == 0
    light = data.flip(0)[:800]
    assert marked(looped(lambda w, x: (x @ w,), [torch.randn(784, 64), light[:64]], [light])[1]) == 0


def test_rows_denser_than_the_sample_are_still_right() -> None:
    data = zeros_and_more(1000, 784)
    data[7] = torch.randn(784)
    w = torch.randn(784, 64)
    loop, graph = looped(lambda w, x: (x @ w,), [w, data[:64]], [data])
    assert marked(graph) == 1
    _, (made,) = loop([], [w[None]], 1, torch.full((1, 64), 7))
    torch.testing.assert_close(made[0], data[7].expand(64, -1) @ w, rtol=1e-4, atol=1e-4)


def test_several_batches_in_a_step() -> None:
    """As seeds side by side have them: rows of the sample fill them all."""
    data, z = zeros_and_more(500, 784), torch.randn(784, 64)

    def of_seeds(z: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (x.reshape(3 * 32, 784) @ z,)

    loop, graph = looped(of_seeds, [z, data[:96].reshape(3, 32, 784)], [data])
    assert marked(graph) == 1
    rows = torch.randint(500, (1, 3, 32))
    _, (made,) = loop([], [z[None]], 1, rows)
    torch.testing.assert_close(made[0], of_seeds(z, data[rows[0]])[0], rtol=1e-4, atol=1e-4)


def test_what_leads_from_data_to_a_product_may_be_long_and_hold_constants() -> None:
    x, w = zeros_and_more(64, 784), torch.randn(784, 64)

    def long(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        for _ in range(1500):
            x = x * torch.tensor(0.999)
        return (x @ w,)

    assert marked(NativeLoop(to_graph(long, w, x), [w, x], 0, 1)._graph) == 1


@pytest.mark.parametrize("form", ["columns apart", "one number repeated"])
def test_operands_with_gaps_are_multiplied_by_torch(form: str) -> None:
    x, w = zeros_and_more(128, 1568), torch.randn(784, 64)

    def apart(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (x[:, ::2] @ w,)

    def repeated(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.ones(()).expand(64, 128) * w[0, 0] @ x, x.T @ w[:1, :1].expand(128, 64))

    function = apart if form == "columns apart" else repeated
    loop = NativeLoop(to_graph(function, w, x), [w, x], 0, 1)
    assert marked(loop._graph) == len(function(w, x))
    loop.load()
    _, made = loop([], [w[None]], 1)
    for values, expected in zip(made, function(w, x), strict=True):
        torch.testing.assert_close(values[0], expected, rtol=1e-4, atol=1e-3)


def test_data_that_are_whole() -> None:
    """Without minibatches they are constants of the graph, or inputs that never change."""
    x, w = zeros_and_more(64, 784), torch.randn(784, 64)
    by_constant = NativeLoop(to_graph(lambda w: (x @ w,), w), [w], 0, 1)
    by_input = NativeLoop(to_graph(lambda w, x: (x @ w,), w, x), [w, x], 0, 1)
    for loop in (by_constant, by_input):
        loop.load()
        assert marked(loop._graph) == 1
        _, (made,) = loop([], [w[None]], 1)
        torch.testing.assert_close(made[0], x @ w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("maker", ["tiles", "blocks", "routines"])
def test_a_gradient_is_made_in_place(maker: str, generated: Callable[[], str], let_make: Callable[[str], None]) -> None:
    """A part of the vector of all gradients is written there, by any kind of product, and not copied."""
    let_make(maker)
    data = zeros_and_more(300, 784)
    given = [torch.randn(128, 400), torch.randn(128, 300), torch.randn(300)]

    def gradients(g: Tensor, h: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat([(g.T @ x).reshape(-1), b, (h.T @ g).reshape(-1)]) * 2,)

    loop, graph = looped(gradients, [*given, data[:128]], [data])
    assert marked(graph) == 1
    assert "cpp_fused_0(" in generated()  # the only kernel of Inductor's reads the whole vector and no part of it
    assert "in_ptr1" not in generated()
    assert "cpp_fused_1(" not in generated()
    _, (made,) = loop([], [t[None] for t in given], 1, torch.arange(128)[None])
    torch.testing.assert_close(made[0], gradients(*given, data[:128])[0], rtol=1e-4, atol=1e-4)
