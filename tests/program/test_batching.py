"""Models with loops in Python: their rounds run together, and are still the program that Pyro runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.engine import Calculus
from bbvi_conv.engine.choose import make_engine
from bbvi_conv.engine.engine import TracedEngine, start_carry
from bbvi_conv.engine.streams import Stream
from bbvi_conv.families import FullRank, MeanField
from bbvi_conv.objectives import ELBO, IWAE
from bbvi_conv.program import batching
from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.build import build
from bbvi_conv.program.graphs import simplify
from bbvi_conv.program.scan import repeated
from bbvi_conv.program.trace import TracedLogWeights, over_draws

ROUNDS = 40
Y = torch.randn(ROUNDS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def walk(y: Tensor) -> None:
    q = pyro.sample("q", dist.HalfNormal(1.0))
    z: Any = pyro.sample("z_0", dist.Normal(0.0, 1.0))
    for t in range(1, len(y)):
        z = pyro.sample(f"z_{t}", dist.Normal(z, q))
        pyro.sample(f"y_{t}", dist.Normal(z, 0.5), obs=y[t])


def second_order(y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    x = [torch.zeros_like(y[0])] * 2
    for t in range(len(y)):
        x.append(pyro.sample(f"x_{t}", dist.Normal(a[0] * x[-1] + a[1] * x[-2], 0.3)))
        pyro.sample(f"y_{t}", dist.StudentT(4.0, x[-1], 0.5), obs=y[t])


def trend(y: Tensor) -> None:
    """A state of two numbers, whose covariance is learnt."""
    factor = pyro.sample("factor", dist.LKJCholesky(2, 1.0))
    step = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=y.dtype)
    z = torch.zeros(2, dtype=y.dtype)
    for t in range(len(y)):
        z = pyro.sample(f"z_{t}", dist.MultivariateNormal(step @ z, scale_tril=factor))
        pyro.sample(f"y_{t}", dist.Normal(z[0], 1.0), obs=y[t])


def coins(y: Tensor) -> None:
    fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
    for i in pyro.plate("data", len(y)):
        pyro.sample(f"y_{i}", dist.Bernoulli(fairness), obs=(y[i] > 0).to(y.dtype))


def irregular(y: Tensor) -> None:
    """Seasons, scales that are numbers of Python's and differ, masks, factors, and every fifth round another."""
    season = pyro.sample("season", dist.Normal(torch.zeros(12, dtype=y.dtype), 1.0).to_event(1))
    z = torch.zeros_like(y[0])
    for t in range(len(y)):
        z = pyro.sample(f"z_{t}", dist.Normal(z, 0.7))
        centre = 2.0 * (z + season[t % 12]) if t % 5 == 0 else z + season[t % 12]
        with pyro.poutine.scale(scale=0.5 + t / 10), pyro.poutine.mask(mask=t % 3 > 0):
            pyro.sample(f"y_{t}", dist.Normal(centre, 1.0), obs=y[t])
        pyro.factor(f"pull_{t}", -0.1 * z**2)


def recursion(y: Tensor) -> None:
    """The variance waits for the round before; densities do not wait for one another."""
    a = pyro.sample("a", dist.Beta(2.0, 5.0))
    b = pyro.sample("b", dist.Beta(5.0, 2.0))
    variance = torch.ones_like(y[0])
    for t in range(1, len(y)):
        variance = 0.1 + a * y[t - 1] ** 2 + b * variance
        pyro.sample(f"y_{t}", dist.Normal(0.0, variance.sqrt()), obs=y[t])


with torch.random.fork_rng():
    torch.manual_seed(1)
    emission = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def network(y: Tensor) -> None:
    pyro.module("emission", emission)
    z = torch.zeros(1, dtype=y.dtype)
    for t in range(len(y)):
        z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 0.5).to_event(1))
        made = emission(z)
        pyro.sample(f"y_{t}", dist.Normal(made[0], made[1].exp()), obs=y[t])


def hidden_states(y: Tensor) -> None:
    """Enumerated: states are summed out one after the other."""
    jump = pyro.sample("jump", dist.Dirichlet(torch.ones(3, 3, dtype=y.dtype)).to_event(1))
    centre = pyro.sample("centre", dist.Normal(torch.tensor([-1.0, 0.0, 1.0], dtype=y.dtype), 1.0).to_event(1))
    z: Any = 0
    for t in pyro.markov(range(len(y))):
        law = dist.Categorical(jump[..., z, :] if t else jump[0])
        z = pyro.sample(f"z_{t}", law, infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(centre[z], 0.7), obs=y[t])


MODELS = [walk, second_order, trend, coins, irregular, recursion, network, hidden_states]


@pytest.fixture
def as_it_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], TracedLogWeights]:
    """The graphs of a program without their rounds together."""

    def traced(program: Any) -> TracedLogWeights:
        with monkeypatch.context() as patched:
            patched.setattr("bbvi_conv.program.trace.plan", lambda graph: None)
            made = TracedLogWeights(program)
            made.prepare(joint=True)
        return made

    return traced


def nodes(traced: TracedLogWeights) -> int:
    traced.prepare(joint=True)
    graph = traced._graphs[True].graph
    return sum(node.op == "call_function" for node in graph.nodes)


@pytest.mark.parametrize("model", MODELS)
def test_rounds_run_together_and_give_what_pyro_gives(model: Any, as_it_is: Any, moved: Any) -> None:
    rounds = Y if model is not coins else Y.repeat(3)
    program = build(model, None, (rounds,), family=MeanField(), dtype=torch.float64)
    together, apart = TracedLogWeights(program), as_it_is(program)
    assert nodes(together) < nodes(apart) / 4
    x = moved(program)
    for objective in (ELBO(1, "sticking-the-landing"), IWAE(2)):
        feed = Stream(program, 0, "test", objective.draws).once(0, 2)
        ours, right = (Calculus(program, objective, w, 1.0) for w in (together, program.log_weights))
        (grads, losses), (expected, bounds) = ours.gradients(x, feed), right.gradients(x, feed)
        torch.testing.assert_close(losses, bounds, rtol=1e-10, atol=0)
        assert ((grads - expected).norm(dim=1) <= 1e-9 * expected.norm(dim=1)).all()
        assert (expected.norm(dim=1) > 1e-3).all()


@pytest.mark.parametrize("model", [walk, recursion])
def test_so_does_their_curvature(model: Any, moved: Any) -> None:
    program = build(model, None, (Y[:24],), family=MeanField(), dtype=torch.float64)
    x, feed = moved(program), Stream(program, 0, "test", 1).once(0, 2)
    vectors = torch.randn(2, len(x), dtype=x.dtype, generator=torch.Generator().manual_seed(4))
    ours, right = (Calculus(program, ELBO(1), w, 1.0) for w in (TracedLogWeights(program), program.log_weights))
    expected = right.hessian_products(x, vectors, feed)
    torch.testing.assert_close(ours.hessian_products(x, vectors, feed), expected, rtol=1e-9, atol=1e-9)
    assert float(expected.norm()) > 0.1


@pytest.mark.parametrize(
    ("model", "family"),
    [(walk, MeanField()), (walk, FullRank()), (recursion, MeanField()), (hidden_states, MeanField())],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_steps_of_a_long_loop_are_the_same_compiled(model: Any, family: Any) -> None:
    program, rule = build(model, None, (Y,), family=family, dtype=torch.float64), bc.Adam(bc.Constant(0.05))
    start, found = start_carry(rule, program.initial()), {}
    for name in ("traced", "compiled"):
        engine = make_engine(name, program, ELBO(1), rule)
        found[name] = engine.advance(start, Stream(program, 0, "optimise", 1), 0, 50)
        if isinstance(engine, TracedEngine):
            assert len(engine.one.graph.graph.nodes) < 25 * ROUNDS
    (ours, losses), (theirs, expected) = found["compiled"], found["traced"]
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    assert (ours.x - theirs.x).norm() < 1e-9 * (theirs.x - start.x).norm()


def test_what_a_user_detaches_stays_detached() -> None:
    def pulled(y: Tensor) -> None:
        z = torch.zeros_like(y[0])
        for t in range(len(y)):
            z = pyro.sample(f"z_{t}", dist.Normal(z.detach(), 1.0))
            pyro.sample(f"y_{t}", dist.Normal(z * z.detach(), 1.0), obs=y[t])

    program = build(pulled, None, (Y,), family=MeanField(), dtype=torch.float64)
    feed = Stream(program, 0, "test", 1).once(0, 3)
    x = program.initial() + 0.3
    ours, right = (Calculus(program, ELBO(1), w, 1.0) for w in (TracedLogWeights(program), program.log_weights))
    torch.testing.assert_close(ours.gradients(x, feed)[0], right.gradients(x, feed)[0], rtol=1e-10, atol=1e-12)


def sums(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Sixty products and a sum of them; some numbers of them twice, in another order, and one by itself."""
    parts = [(x[i] * y[59 - i]).sin().exp() * (1.0 + i / 7) for i in range(60)]
    total = x[0]
    for part in [*parts, *parts[:20], x[3]]:
        total = total + part
    return total, torch.stack(parts[::-1]), parts[7]


def test_groups_take_each_operation_once_and_in_an_order_that_works() -> None:
    x, y = torch.randn(2, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).unbind()
    graph = simplify(to_graph(sums, x, y))
    planned = batching.plan(graph)
    assert planned is not None
    assert max(len(group.nodes) for group in planned.groups) == 60
    run = batching.batched(planned, lambda f, mapped: over_draws(f, mapped, vectorise=True), repeated)
    for made, expected in zip(run(x, y), sums(x, y), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-13, atol=0)
    made = simplify(to_graph(run, x, y, functional=False))
    assert len(made.graph.nodes) < len(graph.graph.nodes) / 5
    torch.testing.assert_close(made(x, y), sums(x, y), rtol=1e-13, atol=0)


def test_graphs_without_repetition_are_left_alone() -> None:
    turns = torch.randint(3, (400,), generator=torch.Generator().manual_seed(6)).tolist()

    def deep(x: Tensor) -> tuple[Tensor, ...]:
        for turn in turns:
            x = (torch.sin, torch.cos, torch.tanh)[turn](x)
        return (x,)

    assert batching.plan(to_graph(deep, torch.ones(3))) is None
    assert batching.plan(to_graph(lambda x: (x.sin(),), torch.ones(3))) is None
