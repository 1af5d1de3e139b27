"""``scan``: the same numbers and derivatives as a Python loop, one graph node instead of T copies of the body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.engine import Stream, make_engine, start_carry
from bbvi_conv.optim import Adam, InverseSqrt
from bbvi_conv.program.aten_graph import Untraceable, to_graph
from bbvi_conv.program.build import build
from bbvi_conv.program.scan import BODIES, operations

ROUNDS = 6
A, B, C = (torch.tensor(v, dtype=torch.float64) for v in (0.7, (0.4, -1.1), 0.3))
X = torch.linspace(-1, 1, ROUNDS, dtype=torch.float64)


def recursion(a: Tensor, b: Tensor, c: Tensor, x: Tensor, *, reverse: bool = False) -> Tensor:
    """A nested carry, integers among the inputs, a constant, a detached part, and both results used."""
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def step(carry: dict[str, Tensor], given: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        x, t = given
        y = torch.tanh(a * carry["y"] + (b * weights).sum() * x + 0.1 * t) * (1 + carry["y"].detach())
        return {"y": y + x, "sum": 0.5 * carry["sum"] + y * y}, y * a

    last, ys = bc.scan(step, {"y": c, "sum": 2 * c}, (x, torch.arange(ROUNDS)), reverse=reverse)
    return (ys * torch.arange(1, ROUNDS + 1)).sum() + last["y"] * last["sum"]


def traced(**more: Any) -> Callable[..., Tensor]:
    graph = to_graph(lambda *args: recursion(*args, **more), A, B, C, X)
    assert len(graph.graph.nodes) < 40  # power: it is not unrolled
    return graph


@pytest.mark.parametrize("reverse", [False, True])
def test_values_and_derivatives_are_those_of_the_loop(reverse: bool) -> None:
    args = [t.clone().requires_grad_() for t in (A, B, C, X)]
    loop, graph = recursion(*args, reverse=reverse), traced(reverse=reverse)(*args)
    torch.testing.assert_close(graph, loop)
    (first, expected) = (torch.autograd.grad(y, args, create_graph=True) for y in (graph, loop))
    torch.testing.assert_close(first, expected)
    assert all(g.abs().sum() > 0.01 for g in expected)
    mixed = [g[0].sum() * g[3].sum() + g[1].sum() + g[2] for g in (first, expected)]
    second, wanted = (torch.autograd.grad(y, args) for y in mixed)
    torch.testing.assert_close(second, wanted)
    assert max(float(g.abs().sum()) for g in wanted) > 0.01


def test_what_rounds_cost_is_counted() -> None:
    graph = traced()
    alone = len(graph.graph.nodes)
    written, made = operations(graph)
    assert written - alone > 10  # the round's own
    assert made - alone == ROUNDS * (written - alone)


def test_a_round_with_a_solver_has_its_curvature() -> None:
    """A derivative that is only good once, as torch has of a solver by its factors, would lose a term here."""
    eye = torch.eye(2, dtype=torch.float64)

    def filtered(a: Tensor, x: Tensor) -> Tensor:
        def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            matrix = state + (x + a).exp() * eye
            state = torch.linalg.solve(matrix, eye + a * state)
            return state, matrix.logdet()

        return bc.scan(step, eye, x)[1].sum()

    graph = to_graph(filtered, A, X)
    found = [torch.autograd.functional.hessian(run, (A, X)) for run in (graph, filtered)]
    for ours, right in zip(*(torch.utils._pytree.tree_leaves(one) for one in found), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)
        assert right.abs().max() > 1e-3


def test_it_maps_over_draws() -> None:
    graph = traced()
    many = torch.linspace(0.2, 1.0, 5, dtype=torch.float64)
    expected = torch.stack([recursion(a, B, C, X) for a in many])
    torch.testing.assert_close(torch.vmap(lambda a: graph(a, B, C, X))(many), expected)
    rows = torch.stack([X, -X, X * X])
    expected = torch.stack([recursion(A, B, C, x) for x in rows])
    torch.testing.assert_close(torch.vmap(lambda x: graph(A, B, C, x))(rows), expected)


@pytest.mark.parametrize(
    ("step", "carry", "xs", "message"),
    [
        (
            lambda c, x: (c, x),
            torch.zeros(()),
            (torch.zeros(3), torch.zeros(4)),
            r"one T of at least 1, got lengths \[3, 4\]",
        ),
        (lambda c, x: (c, x), torch.zeros(()), torch.zeros(0), r"lengths \[0\]"),
        (lambda c, x: (torch.stack([c, c]), x), torch.zeros(()), torch.zeros(3), "keep the carry's shapes and types"),
        (lambda c, x: ((c, c), x), torch.zeros(()), torch.zeros(3), "keep the carry's shapes and types"),
    ],
)
def test_bad_input_is_named(step: Any, carry: Any, xs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bc.scan(step, carry, xs)


class Holder:
    value: Tensor


HOLDERS = [Holder()]


def test_a_tensor_that_hides_from_the_step_is_refused() -> None:
    def hides(a: Tensor) -> Tensor:
        HOLDERS[0].value = a * 2
        return bc.scan(lambda c, x: (c * HOLDERS[0].value + x, c), a, X)[0]

    with pytest.raises(Untraceable, match="pass it in the carry, in xs, or as a local variable"):
        to_graph(hides, A)


# ---- in models ----

Y = torch.tensor([0.3, -1.2, 0.8, 2.1, -0.4, 0.2, -1.7, 0.9, 1.4, -0.6], dtype=torch.float64)


def garch(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    level = pyro.sample("level", dist.LogNormal(0.0, 1.0))
    shock, memory = pyro.sample("shock", dist.Uniform(0.0, 1.0)), pyro.sample("memory", dist.Uniform(0.0, 1.0))

    def step(variance: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        variance = level + shock * (before - mu) ** 2 + memory * (1 - shock) * variance
        return variance, variance

    _, variances = bc.scan(step, torch.ones_like(y[0]), y[:-1])
    with pyro.plate("time", len(y) - 1):
        pyro.sample("y", dist.Normal(mu, variances.sqrt()), obs=y[1:])


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


flow = Flow()


def ode(y: Tensor) -> None:
    """A module's parameters inside the step."""
    pyro.module("flow", flow.net)
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=y.dtype), 1.0).to_event(1))
    net = flow.net

    def step(state: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        state = state + dt * net(state)
        return state, state

    _, path = bc.scan(step, z, torch.full_like(y, 0.1))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(path[:, 0], 0.5), obs=y)


def second_order(y: Tensor) -> None:
    """What is carried is handed on: one result of a round is what the next one overwrites first."""
    a = pyro.sample("a", dist.Normal(y.new_zeros(2), 0.5).to_event(1))

    def step(before: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        known = torch.tensor(0.5, dtype=x.dtype).exp()
        new = torch.tanh(a[0] * before[0] + a[1] * before[1] + 0.3 * known * x)
        return (new, before[0]), before[1]

    _, means = bc.scan(step, (y[0], y[1]), y[2:])
    with pyro.plate("time", len(y) - 2):
        pyro.sample("y", dist.Normal(means, 0.5), obs=y[2:])


@pytest.mark.parametrize("model", [garch, ode, second_order])
def test_every_engine_runs_it_alike(model: Callable[..., None]) -> None:
    rule, objective = Adam(InverseSqrt(0.05)), bc.ELBO(2)
    program = build(model, None, (Y,), family=bc.MeanField(), dtype=torch.float64)
    start = start_carry(rule, program.initial())
    seen = {}
    for name in ("eager", "traced", "compiled"):
        engine = make_engine(name, program, objective, rule)
        assert engine.name == name
        seen[name], _ = engine.advance(start, Stream(program, 0, "optimise", objective.draws), 0, 50)
    assert (seen["eager"].x - start.x).norm() > 0.1
    torch.testing.assert_close(seen["traced"].x, seen["eager"].x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen["compiled"].x, seen["eager"].x, rtol=1e-9, atol=1e-9)


def test_a_fit_of_a_recursion_has_a_gap_and_a_verdict() -> None:
    fit = bc.fit(garch, args=(Y,), max_steps=1000, engine="traced", num_gradients=8, progress=False)
    gap = fit.verdict.numbers["remaining_gap_nats"]
    assert gap["value"] is not None
    assert gap["low"] <= gap["value"] <= gap["high"]


CELLS = {"lstm": nn.LSTMCell(2, 3).double(), "gru": nn.GRUCell(2, 3).double(), "rnn": nn.RNNCell(2, 3).double()}
CELL: nn.Module = CELLS["lstm"]


def by_a_cell_of_the_file(start: Tensor, x: Tensor) -> Tensor:
    """A network that is a variable of the file, as in a script or a notebook; torch writes into its gates."""

    def step(carry: Any, row: Tensor) -> tuple[Any, Tensor]:
        new = CELL(row, carry)
        return new, (new[0] if isinstance(new, tuple) else new)

    carry = (start, start * 0.5) if isinstance(CELL, nn.LSTMCell) else start
    return (bc.scan(step, carry, x)[1] ** 2).sum()


@pytest.mark.parametrize("kind", CELLS)
def test_recurrent_cells_have_gradients_of_every_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CELL", CELLS[kind])
    names = [name for name, _ in CELL.named_parameters()]

    def function(start: Tensor, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        for name, weight in zip(names, weights, strict=True):
            CELL._parameters[name] = weight  # type: ignore[assignment]
        return (by_a_cell_of_the_file(start, x),)

    kept = dict(CELL._parameters)
    args = [torch.linspace(-1, 1, n, dtype=torch.float64).sin().reshape(s) for n, s in ((12, (4, 3)), (40, (5, 4, 2)))]
    args += [p.detach().clone() for p in CELL.parameters()]
    try:
        graph = to_graph(function, *(t.clone() for t in args))
        leaves = [t.clone().requires_grad_() for t in args]
        found, right = (torch.autograd.grad(run(*leaves)[0], leaves, create_graph=True) for run in (graph, function))
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
        assert min(float(g.detach().abs().max()) for g in right) > 1e-3
        bent = [torch.autograd.grad(sum((g * g).sum() for g in slopes), leaves) for slopes in (found, right)]  # type: ignore[arg-type]
        torch.testing.assert_close(*bent, rtol=1e-9, atol=1e-11)
    finally:
        CELL._parameters.update(kept)


def test_only_what_a_derivative_reads_is_handed_on() -> None:
    """A product is not computed again; of the other results none goes with the rounds back."""
    w = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3)

    def function(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (bc.scan(lambda h, row: ((h @ w).sin() + row, h.cos()), x[:1], x.unsqueeze(1))[0].sum(),)

    graph = to_graph(function, w.clone(), x.clone())
    before = set(BODIES)
    with torch.enable_grad():
        torch.autograd.grad(graph(w.requires_grad_(), x)[0], w)
    (back,) = (BODIES[name] for name in set(BODIES) - before)
    targets = [node.target for node in back.plain.graph.nodes]
    assert targets.count(torch.ops.aten.mm.default) == 2  # towards the carry and the weights, none forwards
    assert back.moving == 3  # the carry before, x and the product
