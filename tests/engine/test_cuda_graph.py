"""Steps over fixed tensors are the traced engine's; captured on a device where there is one."""

from __future__ import annotations

import gc
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.engine import Carry, Stream, TracedEngine, make_engine, start_carry
from bbvi_conv.engine.cuda_graph import UNROLL, FixedSteps, unrolled
from bbvi_conv.families import MeanField
from bbvi_conv.objectives import ELBO
from bbvi_conv.optim import Adam, InverseSqrt
from bbvi_conv.program import Minibatch, Program
from bbvi_conv.program.build import build

RULE = Adam(InverseSqrt(0.1))
X = torch.linspace(-1, 1, 12, dtype=torch.float64)


def gathered(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


def by_index(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", 12, subsample_size=4) as rows:
        pyro.sample("y", dist.Normal(slope * x[rows], 0.5), obs=y[rows])


def recursion(x: Tensor, y: Tensor) -> None:
    """A scan within a scan, both with matrices."""
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(2, 2), 0.5).to_event(2))

    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        state, _ = bc.scan(lambda s, w: (torch.tanh(w @ s) + x, s), state, torch.stack([weights, weights.t()]))
        return state, state.sum()

    _, means = bc.scan(step, x[:2], x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(means, 0.5), obs=y)


def program(model: Any, rows: bool, device: str = "cpu") -> Program:
    batch = Minibatch(4, plate="data") if rows else None
    return build(
        model, None, (X, 2 * X), family=MeanField(), minibatch=batch, dtype=torch.float64, device=torch.device(device)
    )


CASES = [
    (gathered, False, 1),
    (gathered, True, 1),
    (by_index, True, 1),
    (gathered, True, 3),
    (recursion, False, 1),
]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("model", "rows", "seeds"), CASES)
def test_fixed_steps_are_traced_steps(model: Any, rows: bool, seeds: int, fuse: bool) -> None:
    made = program(model, rows)
    traced = make_engine("traced", made, ELBO(2), RULE, num_seeds=seeds)
    assert isinstance(traced, TracedEngine)
    stream = Stream(made, 0, "optimise", 2, num_seeds=seeds)
    start = Carry.stack([start_carry(RULE, made.initial())] * seeds)
    expected, losses = traced.advance(start, stream, 0, 40)
    steps = FixedSteps(traced)
    with torch.no_grad():
        if fuse:
            steps.fuse()
        for _ in range(steps.fill(start, next(stream.steps(0, 40)))):
            steps()
    assert (expected.x - start.x).norm() > 0.1
    near = {"rtol": 1e-12, "atol": 1e-12} if fuse else {"rtol": 0.0, "atol": 0.0}
    for one, other in zip([*steps.carry, steps.losses[:40]], [*expected.flat(), losses], strict=True):
        torch.testing.assert_close(one, other, **near)


def test_long_steps_are_captured_one_by_one() -> None:
    assert [unrolled(n) for n in (100, 1_250, 5_000, 20_001, 10**6)] == [16, 16, 4, 1, 1]


def test_an_engine_of_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match='engine="cuda-graph" does not run on cpu; use engine="auto"'):
        make_engine("cuda-graph", program(gathered, True), ELBO(), RULE)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("fuse", [False, True])
def test_garbage_does_not_end_a_capture(fuse: bool) -> None:
    """An engine that is kept by a circle is released by the collector, which would run among so many operations."""
    made, kept, before = program(recursion, False, "cuda"), [], gc.get_threshold()
    kept.append((kept, make_engine("cuda-graph", made, ELBO(2), RULE)))
    del kept
    gc.set_threshold(50)
    try:
        engine = make_engine("compiled" if fuse else "cuda-graph", made, ELBO(2), RULE)
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()
    assert engine.name == ("compiled" if fuse else "cuda-graph")


@needs_cuda
@pytest.mark.parametrize(("model", "rows", "seeds"), CASES)
def test_captured_steps_are_traced_steps(model: Any, rows: bool, seeds: int) -> None:
    made = program(model, rows, "cuda")
    seen = {}
    for name in ("traced", "cuda-graph", "compiled"):
        engine = make_engine(name, made, ELBO(2), RULE, num_seeds=seeds)
        stream = Stream(made, 0, "optimise", 2, num_seeds=seeds)
        start = Carry.stack([start_carry(RULE, made.initial())] * seeds)
        seen[name] = engine.advance(start, stream, 0, 2 * UNROLL + 3)
    for name in ("cuda-graph", "compiled"):
        torch.testing.assert_close(seen[name][0].x, seen["traced"][0].x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(seen[name][1], seen["traced"][1], rtol=1e-9, atol=1e-9)
