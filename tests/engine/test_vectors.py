"""Exponentials in generated code: accuracy, ends, and where they stand; and numbers from bytes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bbvi_conv.engine.native import NativeLoop
from bbvi_conv.engine.native.lowering import vector_bits
from bbvi_conv.engine.native.vectors import HEADERS, mended
from bbvi_conv.program.aten_graph import to_graph

EPS, TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny


def compiled(x: Tensor) -> Tensor:
    """``x.exp()`` in compiled code, beside another exponential that reads it."""
    loop = NativeLoop(to_graph(lambda x: (x.exp(), x.neg().exp()), x), [x], 0, 1)
    loop.load()
    _, (made, turned) = loop([], [x[None]], 1)
    torch.testing.assert_close(turned[0], x.neg().exp(), equal_nan=True)
    return made[0]


def test_relative_errors_are_a_rounding_or_two() -> None:
    """Where the result is a normal number; below, that is all that is lost."""
    x = torch.cat([torch.linspace(-104, 89, 400_001), torch.logspace(-30, 1, 4001), -torch.logspace(-30, 1, 4001)])
    expected = x.double().exp()
    kept = expected < torch.finfo(torch.float32).max
    error = (compiled(x).double() - expected).abs()[kept]
    assert (error <= 1.5 * EPS * expected[kept] + 0.1 * TINY * EPS).logical_or(expected[kept] < TINY).all()
    assert (error[expected[kept] < TINY] <= TINY * EPS).all()
    assert not (error <= 0.25 * EPS * expected[kept]).all()  # power: float32 it is


def test_ends_are_those_of_torch() -> None:
    ends = torch.tensor([-math.inf, -1e30, -110.0, -0.0, 0.0, 1e-30, 88.7, 88.8, 1e30, math.inf, math.nan])
    made = compiled(ends.repeat(3))  # whole vectors, and a part of one
    assert torch.equal(made.isnan(), ends.repeat(3).isnan())
    torch.testing.assert_close(made, ends.repeat(3).exp(), equal_nan=True, rtol=2 * EPS, atol=0)


@pytest.mark.skipif(vector_bits() not in HEADERS, reason="no vectors of this processor are known")
def test_it_stands_in_the_loop(generated: Callable[[], str]) -> None:
    compiled(torch.randn(1000))
    text = generated()
    assert "exponential(tmp" in text
    assert text.index("exponential(const at::vec::Vectorized<float>&") < text.index("exponential(tmp")


def test_other_processors_keep_torch_s() -> None:
    texts = ["auto tmp1 = tmp0.exp();", "auto tmp2 = tmp0 * tmp0;"]
    assert mended(texts, 128) == tuple(texts)
    for bits in HEADERS:
        assert mended(texts[1:], bits) == tuple(texts[1:])
        assert mended(texts, bits)[1:] == ("auto tmp1 = exponential(tmp0);", texts[1])


def test_bytes_become_numbers(generated: Callable[[], str]) -> None:
    """Whole vectors of them and the rest; with vectors of 256 bits straight from memory."""
    images = torch.arange(256, dtype=torch.uint8).repeat(3)[:-3]
    loop = NativeLoop(to_graph(lambda x: (x.float() * 2,), images), [images], 0, 1)
    loop.load()
    _, (made,) = loop([], [images[None]], 1)
    assert torch.equal(made[0], images.float() * 2)
    assert ("loadu_one_fourth" in generated()) == (vector_bits() == 256)


def test_asking_for_what_is_no_number_is_a_comparison(generated: Callable[[], str]) -> None:
    x = torch.tensor([0.0, 1.0, -1.0, math.nan, math.inf, -math.inf]).repeat(7)
    loop = NativeLoop(to_graph(lambda x: (x.isnan().float(), x.isinf().float()), x), [x], 0, 1)
    loop.load()
    _, (none, infinite) = loop([], [x[None]], 1)
    assert torch.equal(none[0], x.isnan().float())
    assert torch.equal(infinite[0], x.isinf().float())
    assert "std::isnan" not in generated()
    assert "std::isinf" not in generated()
