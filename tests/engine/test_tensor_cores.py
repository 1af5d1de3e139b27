"""Products of float32 matrices by parts of bfloat16: as accurate as float32, wherever a step makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from bbvi_conv.engine.fused import fused
from bbvi_conv.engine.tensor_cores import DEPTH, blocks, on_tensor_cores, products_of_parts, split
from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.graphs import is_fresh

OP = torch.ops.bbvi_conv.products_of_parts.default
SUM = torch.ops.aten.sum.dim_IntList
MM = torch.ops.aten.mm.default


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Of all magnitudes from 1e-6 to 1e6, about."""
    normal, scale = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).unbind()
    return normal * torch.exp(4 * scale)


def calls(graph: GraphModule, target: Any) -> list[Any]:
    return [node for node in graph.graph.nodes if node.target is target]


def network(images: Tensor, weight: Tensor, bias: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients of two layers."""

    def loss(weight: Tensor, bias: Tensor, last: Tensor) -> Tensor:
        hidden = torch.tanh(torch.nn.functional.linear(images.to(weight.dtype), weight, bias))
        logits = hidden @ last.t()
        return torch.nn.functional.softplus(logits).sum() / len(images)

    grads, value = torch.func.grad_and_value(loss, (0, 1, 2))(weight, bias, last)
    return value, *grads


@pytest.fixture
def inputs() -> list[Tensor]:
    seeded = torch.Generator().manual_seed(0)
    images = torch.randint(256, (512, 144), generator=seeded, dtype=torch.uint8)
    given = [torch.randn(*shape, generator=seeded) / 500 for shape in ((128, 144), (128,), (160, 128))]
    return [images, *given]


def off(one: Tensor, exact: Tensor) -> float:
    return float((one.double() - exact).norm() / exact.norm())


def test_three_parts_are_the_numbers_and_two_their_first_bits() -> None:
    x = numbers(10_000)
    parts = split(x, 3)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert torch.equal(sum(part.double() for part in parts), x.double())
    first = sum(part.double() for part in split(x, 2))
    relative = ((first - x.double()) / x.double()).abs()
    assert 2.0**-19 < relative.max() <= 2.0**-17


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_parts_of_what_is_not_finite_are_not(value: float) -> None:
    assert not torch.isfinite(sum(part.float() for part in split(torch.tensor([value]), 3)))
    canonical = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # a GPU's own NaN
    assert sum(part.float() for part in split(canonical, 3)).isnan()


@pytest.mark.parametrize(
    "size", [(51_200, 784, 400), (784, 400, 51_200), (1_024, 40, 400), (40, 400, 1_024), (1, 1, 7)]
)
def test_parts_of_a_sum_cover_it(size: tuple[int, int, int]) -> None:
    _, parts, length = blocks(*size)
    assert length % DEPTH == 0
    assert (parts - 1) * length < size[2] <= parts * length


@pytest.mark.parametrize("fuse", [False, True])
def test_a_step_by_parts_is_the_step(inputs: list[Tensor], fuse: bool) -> None:
    exact = network(*(t if t.dtype is torch.uint8 else t.double() for t in inputs))
    plain = to_graph(network, *inputs)
    graph = on_tensor_cores(plain, inputs, tf32=False)
    found = fused(graph)(*inputs) if fuse else graph(*inputs)
    for one, by_parts, reference in zip(plain(*inputs), found, exact, strict=True):
        assert off(by_parts, reference) < 2 * off(one, reference) + 1e-7
        assert off(by_parts, reference) < 1e-6


def test_what_becomes_of_a_step(inputs: list[Tensor]) -> None:
    graph = on_tensor_cores(to_graph(network, *inputs), inputs, tf32=False)
    counts = [call.args[1] for call in calls(graph, OP)]
    # a layer, another, the gradients of hidden numbers and weights in one, that of the first weights: whole numbers
    assert counts == [[1, 3], [3, 3], [3, 3, 3, 3], [3, 1]]
    assert not calls(graph, MM)
    # the sum over images, of the gradient of the bias, is made where that of the weights is
    assert [call.args[2] for call in calls(graph, OP)] == [[False], [False], [False, False], [True]]
    assert not [s for s in calls(graph, SUM) if s.args[0].meta["tensor_meta"].shape == (512, 128)]


def test_two_parts_keep_more_than_tf32(inputs: list[Tensor]) -> None:
    plain = to_graph(network, *inputs)
    graph = on_tensor_cores(plain, inputs, tf32=True)
    assert {count for call in calls(graph, OP) for count in call.args[1]} == {1, 2}
    exact = network(*(t if t.dtype is torch.uint8 else t.double() for t in inputs))
    for found, reference in zip(graph(*inputs), exact, strict=True):
        assert off(found, reference) < 2.0**-14


def test_large_products_of_tf32_are_the_librarys_and_their_second_factor_lies_along_the_sum() -> None:
    given = [numbers(16_384, 256), numbers(256, 256, seed=1)]
    plain = to_graph(lambda a, b: a @ b, *given)
    (call,) = calls(on_tensor_cores(plain, given, tf32=True), MM)
    assert call.args[1].target is torch.ops.aten.t.default
    assert is_fresh(call.args[1].args[0])
    assert calls(on_tensor_cores(plain, given, tf32=False), OP)


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [
        (((512, 256), (256, 512)), torch.float64),
        (((64, 64), (64, 64)), torch.float32),
        (((2**20, 8), (8, 64)), torch.float32),
    ],
    ids=["float64", "small", "narrow"],
)
def test_other_products_stay(shapes: tuple[Any, Any], dtype: torch.dtype) -> None:
    given = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    graph = on_tensor_cores(to_graph(lambda a, b: a @ b, *given), given, tf32=False)
    assert calls(graph, MM)
    assert not calls(graph, OP)


def factors(
    layout: str, m: int, n: int, k: int, whole: bool, device: str
) -> tuple[Tensor, Tensor, list[Tensor], list[int]]:
    """Two factors, each as it is (n) or as the transpose of what lies in memory (t), and their parts."""
    shapes = ((m, k) if layout[0] == "n" else (k, m), (k, n) if layout[1] == "n" else (n, k))
    x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(m)).to(device) for shape in shapes)
    x = (x > 0).float() if whole else x
    parts = [[x.bfloat16()] if whole else list(split(x, 3)), list(split(y, 3))]
    for side, turn in enumerate(layout):
        parts[side] = [part.t() if turn == "t" else part for part in parts[side]]
    return (
        (x.t() if layout[0] == "t" else x),
        (y.t() if layout[1] == "t" else y),
        [*parts[0], *parts[1]],
        list(map(len, parts)),
    )


SIZES = [
    ("nt", 1024, 784, 400, False),
    ("nn", 1000, 404, 779, False),
    ("tn", 130, 70, 1024, True),
    ("tn", 784, 400, 5003, False),
]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    ],
)
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_products_of_parts_are_no_less_accurate_than_float32(size: Any, pair: bool, device: str) -> None:
    group = [factors(*size, device), *([factors(*SIZES[0], device)] if pair else [])]
    made = products_of_parts(
        [part for _, _, parts, _ in group for part in parts],
        [c for *_, counts in group for c in counts],
        [True] * len(group),
    )
    for (x, y, *_), out, rows in zip(group, made[::2], made[1::2], strict=True):
        exact = x.double() @ y.double()
        assert off(out.sum(0), exact) < max(off(x @ y, exact), 2e-7)
        assert off(rows.sum(0), x.double().sum(1)) < 1e-6
