"""Data and draws at which a model has no density, although a formula may give one."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from torch import Tensor

import bbvi_conv as bc


def coin(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def test_all_rows_are_asked_not_those_of_the_first_batch_alone() -> None:
    y = torch.zeros(60)
    y[40] = 9.0
    for minibatch in (None, bc.Minibatch(20, plate="rows")):
        with pytest.raises(ValueError, match="a value of observed site 'y' lies outside the support Boolean"):
            bc.build(coin, None, (y,), family=bc.MeanField(), minibatch=minibatch)
        bc.build(coin, None, (y.clamp(max=1.0),), family=bc.MeanField(), minibatch=minibatch)


def stretched(y: Tensor) -> None:
    """Twice an exponential number: positive, of which torch knows nothing."""
    law = dist.TransformedDistribution(dist.Exponential(1.0), [transforms.AffineTransform(0.0, 2.0)])
    s = pyro.sample("s", law)
    pyro.sample("y", dist.Normal(s, 1.0), obs=y)


def least(y: Tensor) -> None:
    m = pyro.sample("m", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Pareto(m, 3.0), obs=y)


def positive(y: Tensor) -> None:
    """A support that its prior names, and a posterior near its end."""
    s = pyro.sample("s", dist.Exponential(50.0))
    pyro.sample("y", dist.Normal(s, 1.0), obs=y)


CASES: list[tuple[Callable[[Tensor], None], Tensor, str]] = [
    (stretched, torch.tensor(0.2), "site 's' has no density at values that the guide draws"),
    (least, torch.tensor([2.3, 2.6, 3.0, 4.4, 2.2, 7.0]), "site 'y' has no density at values that the guide draws"),
    (positive, torch.tensor(-1.0), ""),
]


@pytest.mark.parametrize(("model", "data", "told"), CASES, ids=["transformed", "depends on a latent", "named"])
def test_draws_that_leave_a_support_are_told(model: Callable[[Tensor], None], data: Tensor, told: str) -> None:
    fit = bc.fit(model, args=(data,), max_steps=4000, khat_draws=200, progress=False)
    found = [reason for reason in fit.verdict.reasons if "no density" in reason]
    assert (fit.verdict.outcome == "wrong_family") == bool(told)
    assert len(found) == bool(told)
    assert told in "".join(found)


def test_two_plates_that_subsample() -> None:
    def both(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 30, subsample_size=5, dim=-2):
            pyro.sample("c", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    with pytest.raises(ValueError, match="'columns' subsamples 5 of 30 rows beside plate 'rows': only one plate can"):
        bc.build(both, None, (torch.zeros(12),), family=bc.MeanField(), minibatch=bc.Minibatch(4, plate="rows"))
