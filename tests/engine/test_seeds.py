"""Several seeds at once: each is the run of that seed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from bbvi_conv.engine import Carry, Engine, Stream, make_engine, start_carry
from bbvi_conv.families import MeanField
from bbvi_conv.objectives import ELBO, IWAE
from bbvi_conv.optim import SGD, Adam, Constant, InverseSqrt
from bbvi_conv.program import Minibatch, Program
from bbvi_conv.program.build import build

RULE = Adam(InverseSqrt(0.1))
SEEDS, FIRST = 3, 7


def starts(program: Program, count: int) -> list[Tensor]:
    """A start of its own for every seed."""
    x = program.initial()
    return [x + 0.01 * s * torch.arange(1, len(x) + 1) for s in range(count)]


def together(
    name: str, program: Program, objective: Any, *chunks: int, rule: Any = RULE, seeds: int = SEEDS
) -> tuple[list[Carry], Tensor]:
    """Carry of every seed and losses ``(steps, S)``; a fresh stream for each chunk, as a resumed run has."""
    engine = make_engine(name, program, objective, rule, num_seeds=seeds)
    carry, losses, start = Carry.stack([start_carry(rule, x) for x in starts(program, seeds)]), [], 0
    for count in chunks:
        stream = Stream(program, FIRST, "optimise", objective.draws, num_seeds=seeds)
        carry, part = engine.advance(carry, stream, start, count)
        losses.append(part)
        start += count
    return carry.unstack(), torch.cat(losses)


def alone(engine: Engine, objective: Any, count: int, seed: int, rule: Any = RULE) -> tuple[Carry, Tensor]:
    """The same from an engine of one seed."""
    program = engine.calculus.program
    carry = start_carry(rule, starts(program, seed + 1)[seed])
    return engine.advance(carry, Stream(program, FIRST + seed, "optimise", objective.draws), 0, count)


def regression(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


def autoencoder(coder: Any) -> Program:
    """A K-sample bound, minibatches, networks on both sides."""
    torch.manual_seed(0)
    model, guide = coder(nn.Linear(4, 4).double(), nn.Linear(2, 4).double())
    x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return build(model, guide, (x,), minibatch=Minibatch(8, plate="data"), dtype=torch.float64)


@pytest.fixture
def programs(shipped, coder) -> Callable[[str], tuple[Program, Any]]:
    """``programs(name)``: a program and an objective."""

    def make(name: str) -> tuple[Program, Any]:
        if name == "eight schools":
            module = shipped("eight_schools")
            return build(module.centered, None, module.data(), family=MeanField()), ELBO(2, "sticking-the-landing")
        if name == "epochs":
            x = torch.linspace(-1, 1, 11, dtype=torch.float64)
            batch = Minibatch(3, plate="data", sampling="epoch")
            made = build(regression, None, (x, 2 * x), family=MeanField(), minibatch=batch, dtype=torch.float64)
            return made, ELBO(2)
        return autoencoder(coder), IWAE(3, "doubly-reparameterised")

    return make


@pytest.mark.parametrize("name", ["eager", "traced"])
@pytest.mark.parametrize("case", ["eight schools", "epochs", "autoencoder"])
def test_every_seed_is_the_run_of_that_seed_alone(programs, case: str, name: str) -> None:
    program, objective = programs(case)
    count = 12 if name == "eager" else 260 if case == "epochs" else 40
    single = make_engine(name, program, objective, RULE)
    carries, losses = together(name, program, objective, count)
    assert losses.shape == (count, SEEDS)
    for seed, carry in enumerate(carries):
        expected, own = alone(single, objective, count, seed)
        assert (expected.x - starts(program, SEEDS)[seed]).norm() > 0.1  # power: the iterates moved
        for got, wanted in zip(carry.flat(), expected.flat(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(losses[:, seed], own, rtol=1e-10, atol=1e-12)
    assert not torch.equal(carries[0].x, carries[1].x)


@pytest.mark.parametrize("name", ["eager", "traced"])
def test_chunk_boundaries_may_fall_anywhere(programs, name: str) -> None:
    program, objective = programs("epochs")
    whole, losses = together(name, program, objective, 30)
    parts, pieces = together(name, program, objective, 4, 25, 1)
    for one, other in zip(whole, parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.flat(), other.flat(), strict=True))
    assert torch.equal(losses, pieces)


@pytest.mark.parametrize("name", ["eager", "traced", "compiled"])
def test_a_seed_that_is_not_finite_freezes_alone(name: str) -> None:
    """Within a chunk, and in those that follow, where the others go on."""

    def walled(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(z > 2.0, (2.0 - z).sqrt(), z))

    program = build(walled, None, (torch.tensor(0.0),), family=MeanField(1.0), dtype=torch.float64)
    rule = SGD(Constant(0.001))
    single = make_engine(name, program, ELBO(), rule)
    carries, losses = together(name, program, ELBO(), 40, 40, 20, rule=rule, seeds=5)
    bad = [int(carry.bad) for carry in carries]
    assert 0 < sum(b >= 0 for b in bad) < 5  # power: some do, some do not
    for seed, carry in enumerate(carries):
        expected, _ = alone(single, ELBO(), 100, seed, rule)
        assert int(expected.bad) == bad[seed]
        assert int(carry.step) == (100 if bad[seed] < 0 else bad[seed])
        torch.testing.assert_close(carry.x, expected.x, rtol=1e-10, atol=1e-12)
        assert torch.isfinite(losses[: int(carry.step), seed]).all()


def test_where_vmap_fails_every_seed_has_its_copy_in_the_graph(programs, monkeypatch) -> None:
    """``vmap`` is made to fail for the mapping over seeds."""
    from bbvi_conv.engine import engine as module

    def refusing(function: Any, mapped: Any, *, vectorise: bool) -> Any:
        if vectorise:
            raise module.Untraceable("no")
        return original(function, mapped, vectorise=False)

    original = module.over_draws
    program, objective = programs("eight schools")
    expected, losses = together("traced", program, objective, 5)
    monkeypatch.setattr(module, "over_draws", refusing)
    got, same = together("traced", program, objective, 5)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.x, other.x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(same, losses, rtol=1e-10, atol=1e-12)


def test_changing_buffers_are_refused() -> None:
    network = nn.BatchNorm1d(2)

    def model(x: Tensor) -> None:
        pyro.module("network", network)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z + network(x), 1.0).to_event(1), obs=x)

    program = build(model, None, (torch.randn(6, 2),), family=MeanField(), dtype=torch.float32)
    with pytest.raises(ValueError, match="changes as the program runs, and 2 seeds at once would share it"):
        make_engine("auto", program, ELBO(), RULE, num_seeds=2)
    assert make_engine("auto", program, ELBO(), RULE).name == "eager"
