"""Many evaluations in one call of a mapped graph are those of one after the other."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bbvi_conv.engine import Calculus, Stream
from bbvi_conv.engine.calculus import LANES, VECTORS, WORTH
from bbvi_conv.families import FullRank
from bbvi_conv.objectives import ELBO
from bbvi_conv.program import Minibatch
from bbvi_conv.program.build import build


def regression(x: Tensor, y: Tensor) -> None:
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.StudentT(4.0, x @ slopes, 0.5), obs=y)


@pytest.fixture(scope="module")
def both() -> tuple[Calculus, Calculus]:
    """Mapped, and by a loop over the same graph of one evaluation."""
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = Minibatch(5, plate="data")
    program = build(regression, None, (x, x.sum(-1)), family=FullRank(), minibatch=rows, dtype=torch.float64)
    mapped = Calculus.of(program, ELBO(2, "sticking-the-landing"), 20.0)
    assert mapped.vectorise
    looped = copy.copy(mapped)
    looped.vectorise, looped._graphs = False, {}
    return mapped, looped


ROUNDING = {"rtol": 1e-12, "atol": 1e-13}


@pytest.mark.parametrize("count", [1, 5, LANES[1], LANES[1] + 9])
@pytest.mark.parametrize("points", ["one", "many"])
def test_gradients_and_losses(both: tuple[Calculus, Calculus], moved, count: int, points: str) -> None:
    mapped, looped = both
    x = moved(mapped.program)
    if points == "many":
        x = x + 0.1 * torch.arange(count, dtype=x.dtype).unsqueeze(-1)
    feed = Stream(mapped.program, 0, "evaluate", 2).once(3, count)
    for got, expected in zip(mapped.gradients(x, feed), looped.gradients(x, feed), strict=True):
        assert len(got) == count
        torch.testing.assert_close(got, expected, **ROUNDING)
    torch.testing.assert_close(mapped.losses(x, feed), looped.losses(x, feed), **ROUNDING)
    assert mapped.vectorise


@pytest.mark.parametrize("vectors", [1, 3, VECTORS[-1] + 2])
@pytest.mark.parametrize("count", [1, 11])
@pytest.mark.parametrize("worth", [WORTH, 1], ids=["in one piece", "in pieces"])
def test_products(
    both: tuple[Calculus, Calculus], moved, monkeypatch: pytest.MonkeyPatch, count: int, vectors: int, worth: int
) -> None:
    monkeypatch.setattr("bbvi_conv.engine.calculus.WORTH", worth)
    mapped, looped = both
    x = moved(mapped.program)
    feed = Stream(mapped.program, 0, "evaluate", 2).once(4, count)
    many = torch.randn(vectors, len(x), generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    hessian, fisher = mapped.hessian_products(x, many, feed), mapped.fisher_products(x, many, feed)
    assert mapped.vectorise
    torch.testing.assert_close(hessian, looped.hessian_products(x, many, feed), **ROUNDING)
    torch.testing.assert_close(fisher, looped.fisher_products(x, many, feed), **ROUNDING)
    assert hessian.shape == fisher.shape == many.shape
    assert (hessian - fisher).abs().max() > 1e-3  # power: they are two matrices, and neither is zero
    assert min(hessian.abs().max(), fisher.abs().max()) > 1e-3
