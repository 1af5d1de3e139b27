"""Recursions in Python loops become scans, wherever rounds look back, and stay what they were."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bbvi_conv.program import batching
from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.graphs import simplify
from bbvi_conv.program.recursions import _periodic
from bbvi_conv.program.scan import BODIES, repeated
from bbvi_conv.program.trace import over_draws

ROUNDS = 60
A, B = torch.randn(2, ROUNDS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()

vectorised = functools.partial(over_draws, vectorise=True)


def smoothed(a: Tensor, b: Tensor) -> Tensor:
    """Exponential smoothing, whose residuals are summed outside; numbers of Python's differ from round to round."""
    level, loss = a[0], torch.zeros_like(a[0])
    for t in range(1, ROUNDS):
        loss = loss + (b[t] - level.sin()) ** 2 * (1 + t / 10)
        level = a[3].sigmoid() * level + a[t] * 0.3 + t / 100
    return loss


def looks_back(a: Tensor, b: Tensor) -> Tensor:
    """Two and three rounds back, by two series that feed each other."""
    x, v = [a[0], a[1], a[2]], [b[0].exp()] * 2
    for t in range(3, ROUNDS):
        v.append(0.1 + 0.3 * x[t - 1] ** 2 + 0.2 * v[-2] + b[t].exp() * 0.1)
        x.append(torch.tanh(0.5 * x[t - 1] - 0.2 * x[t - 3] + a[t] * v[-1].sqrt()))
    return (torch.stack(x) * b).sum() + torch.stack(v).log().sum()


def one_after_the_other(a: Tensor, b: Tensor) -> Tensor:
    """The second goes back over what the first has made; and neither knows its inputs but by the carry and b[5]."""
    xs = [a[0]]
    for _ in range(ROUNDS):
        xs.append((1.1 * xs[-1]).sin() + b[5])
    back = b[0]
    for x in reversed(xs):
        back = (back - x).tanh() * 0.9
    return back + xs[-1]


def filtered(a: Tensor, b: Tensor) -> Tensor:
    """A Kalman filter: matrices, an inverse, and a log-determinant of every round."""
    turn = torch.stack([torch.stack([a[0].cos(), -a[0].sin()]), torch.stack([a[0].sin(), a[0].cos()])])
    mean, cov, loss = b[:2] * 0, torch.eye(2, dtype=a.dtype), a[0] * 0
    for t in range(ROUNDS // 2):
        mean, cov = turn @ mean, turn @ cov @ turn.T + 0.1 * torch.eye(2, dtype=a.dtype)
        total = cov + b[1].exp() * torch.eye(2, dtype=a.dtype)
        gain = torch.linalg.solve(total, cov).T
        rest = torch.stack([a[2 * t], b[2 * t]]) - mean
        loss = loss + torch.logdet(total) + rest @ torch.linalg.solve(total, rest)
        mean, cov = mean + gain @ rest, cov - gain @ cov
    return loss


def forward_algorithm(a: Tensor, b: Tensor) -> Tensor:
    """Largest entries are taken off, and kept out of the derivative: an operation of two results, one unused."""
    jump = (a[:9].reshape(3, 3)).log_softmax(-1)
    message = jump[0]
    for t in range(ROUNDS):
        top = message.detach().max(-1, keepdim=True)[0]
        emitted = -((a[t] - b[:3]) ** 2)
        message = top + ((message - top).exp() @ jump.exp()).log() + emitted
    return message.logsumexp(-1)


with torch.random.fork_rng():
    torch.manual_seed(1)
    cell, layer = nn.GRUCell(1, 3).double(), nn.RNN(1, 3).double()


def recurrent(a: Tensor, b: Tensor) -> Tensor:
    state, loss = torch.zeros(3, dtype=a.dtype), a[0] * 0
    for t in range(ROUNDS):
        state = cell(a[t : t + 1], state)
        loss = loss + (state.sum() - b[t]) ** 2
    return loss


PACKED = pack_padded_sequence(torch.stack([A, B, A + B]).unsqueeze(2), torch.tensor([60, 59, 30]), batch_first=True)


def packed(a: Tensor, b: Tensor) -> Tensor:
    """Sequences of three lengths, which torch writes into memory that it has laid out before."""
    made, last = layer(PACKED._replace(data=PACKED.data * a[:3].exp().sum()))
    states, _ = pad_packed_sequence(made, batch_first=True)
    loss = (last**2).sum()
    for t in range(ROUNDS):
        loss = loss + (states[:, t].sum() - b[t]).cos() * (1 + t / 7)
    return loss


def with_a_break(a: Tensor, b: Tensor) -> Tensor:
    """Every twentieth round starts anew, from another number."""
    x, loss = a[0], a[0]
    for t in range(ROUNDS):
        x = b[t // 20] if t % 20 == 19 else (0.9 * x + a[t]).sin()
        loss = loss + x * x
    return loss


def what_goes_out_comes_back(a: Tensor, b: Tensor) -> Tensor:
    """A part of every round hangs on the carry and nothing else of the chain: it is one of the recursion's own."""
    x, total = a[0], a[0]
    for t in range(ROUNDS):
        side = (x * b[t]).cos().exp()
        x = torch.tanh(a[t] + 0.4 * x) * side
        total = total + side
    return total


def begun_by_hand(a: Tensor, b: Tensor) -> Tensor:
    """What comes before the first round looks like a round, but is none: two rounds back lie given numbers."""
    before, x = [b[0], b[1]], torch.tanh((a[0] + b[2]).sin() + b[3])
    loss = x * 0
    for t in range(1, ROUNDS):
        before.append((a[t] + x).sin())
        x = torch.tanh(before[-1] + before[-3])
        loss = loss + (x - b[t]) ** 2 * (1 + t / 10)
    return loss


def written_between(a: Tensor, b: Tensor) -> Tensor:
    """Memory is read, other memory is written to, and read as well."""
    loss = a[0] * 0
    for k, x in enumerate((a, b)):
        states, _ = pad_packed_sequence(layer(PACKED._replace(data=PACKED.data * x[:3].exp().sum()))[0])
        for t in range(20):
            loss = loss + states[t, 0, k]
    return loss


def counted(a: Tensor, b: Tensor) -> Tensor:
    """Sums of truth values and of whole numbers keep their types; a number that is doubled is one term twice."""
    hit, number, loss = a[0] > 2, (a[0] > 2).int(), a[0]
    for t in range(ROUNDS):
        hit, number = hit + (a[t] > b[t]), number + (a[t] > b[t]).int()
        loss = loss + (a[t] - b[3]).sin() ** 2 * (1 + t / 10)
    for _ in range(40):
        loss = loss + loss
    return loss * hit + number // 7


def begun_by_a_result(a: Tensor, b: Tensor) -> Tensor:
    """What a loop begins with is picked from several results, as what a round hands on."""
    x = a[:3].sort()[0]
    for t in range(ROUNDS):
        x = (x.sin() + a[t] * b[:3]).reshape(3)
        x = torch.cummax(0.9 * x + b[3], 0)[0]
    return x.sum()


OTHERS = {  # times fewer operations at least, and scans
    with_a_break: (2, 3),
    what_goes_out_comes_back: (2, 1),
    begun_by_hand: (2, 1),
    written_between: (1, 4),
    counted: (2, 2),
    begun_by_a_result: (2, 1),
}
FUNCTIONS = [smoothed, looks_back, one_after_the_other, filtered, forward_algorithm, recurrent, packed]


def graphs(function: Callable[..., Tensor]) -> tuple[GraphModule, GraphModule]:
    """As it is traced, and with its rounds together."""
    graph = simplify(to_graph(lambda a, b: (function(a, b),), A.clone(), B.clone()), differentiable=True)
    planned = batching.plan(graph)
    assert planned is not None
    run = batching.batched(planned, vectorised, repeated)
    return graph, simplify(to_graph(run, A.clone(), B.clone(), functional=False), differentiable=True)


def scans(graph: GraphModule) -> list[Any]:
    return graph.graph.find_nodes(op="call_function", target=torch.ops.bbvi_conv.scan.default)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_loop_is_a_scan_and_has_its_derivatives(function: Any) -> None:
    graph, rolled = graphs(function)
    assert len(rolled.graph.nodes) < len(graph.graph.nodes) / 3
    assert len(scans(rolled)) == (2 if function in (one_after_the_other, packed) else 1)
    found = []
    for run in (lambda a, b: rolled(a, b)[0], function):
        leaves = [A.clone().requires_grad_(), B.clone().requires_grad_()]
        value = run(*leaves)
        slopes = torch.autograd.grad(value, leaves, create_graph=True)
        bent = torch.autograd.grad(sum((s * s).sum() for s in slopes), leaves)
        found.append([value.detach(), *(s.detach() for s in slopes), *bent])
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)
        assert right.abs().max() > 1e-3


def test_it_maps_over_draws() -> None:
    _, rolled = graphs(looks_back)
    many = torch.stack([A, A.flip(0), B])
    found = torch.vmap(lambda a: rolled(a, B)[0])(many)
    torch.testing.assert_close(found, torch.stack([looks_back(a, B) for a in many]))


@pytest.mark.parametrize(("function", "fewer", "count"), [(f, *known) for f, known in OTHERS.items()])
def test_whatever_becomes_of_a_loop_it_gives_the_same(function: Any, fewer: int, count: int) -> None:
    graph, rolled = graphs(function)
    torch.testing.assert_close(rolled(A, B)[0], function(A, B))
    assert len(rolled.graph.nodes) < len(graph.graph.nodes) / fewer
    assert len(scans(rolled)) == count


def test_a_round_holds_only_what_waits() -> None:
    _, rolled = graphs(smoothed)
    (scan,) = scans(rolled)
    body = BODIES[scan.args[0]].graph
    assert sum(node.op == "call_function" for node in body.graph.nodes) <= 4  # products, and two sums at most


@pytest.mark.parametrize(
    ("signatures", "found"),
    [
        ("xy" + "abc" * 9 + "zz", (2, 3, 9)),
        ("aaaaaaaab" * 12, (0, 9, 12)),
        ("a" * 8, (0, 1, 8)),
        ("ab" * 7, None),
        ("abcdefgh", None),
        ("", None),
    ],
)
def test_periods(signatures: str, found: Any) -> None:
    assert _periodic(signatures) == found
