"""Short rounds: what does not wait for the round before leaves the loop, and everything is what it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import bbvi_conv as bc
from bbvi_conv.program import rounds
from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.graphs import PRODUCTS, simplify
from bbvi_conv.program.rounds import with_short_rounds
from bbvi_conv.program.scan import scans
from bbvi_conv.program.trace import over_draws, simplified

T = 12
A = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(3, 4)
W = torch.linspace(0.9, -0.7, 16, dtype=torch.float64).reshape(4, 4)
X = torch.linspace(-2.0, 1.5, T * 12, dtype=torch.float64).sin().reshape(T, 3, 4)
Both = tuple[Tensor, Tensor]


def recurrent(a: Tensor, w: Tensor, x: Tensor, *, reverse: bool = False) -> tuple[Tensor, ...]:
    """Inputs, outputs and two weights by products; of what is carried one half is of use to nobody."""

    def step(carry: Both, row: Tensor) -> tuple[Both, Both]:
        h, count = carry
        h = torch.tanh(h @ w + row @ w.t() + count.detach() * 0)
        return (h, count + 1), (h @ w.exp(), h.sum())

    (last, _), (out, _) = bc.scan(step, (a, a[0, 0]), x, reverse=reverse)
    return last, out


def narrow(a: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """A recursion of single numbers."""

    def step(s: Tensor, row: Both) -> Both:
        value, t = row
        s = (0.3 + w[0, 0].exp() * (value - a[0, 0]) ** 2 + 0.5 * s * s).sqrt()
        return s, s.log() * value + t

    last, ys = bc.scan(step, a[0, 1].exp(), (x[:, 0, 0], torch.arange(T)))
    return last, ys


def summed(a: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Sums over the rounds of all that sums of products may go through; no round depends on another."""

    def step(s: Both, row: Tensor) -> tuple[Both, Tensor]:
        total, vector = s
        outer = (row.t() @ row).neg() + (row.t() @ (row * a)).t().reshape(4, 4) - w @ w
        return (total + outer, vector + row @ w[0]), row[0]

    (total, vector), rows = bc.scan(step, (w, a[:, 0]), x)
    return total, vector, rows


def shifted(a: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """What is carried two rounds on, what is never changed, and a carry that another round's input becomes."""

    def step(carry: tuple[Tensor, ...], row: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        one, two, fixed, before = carry
        return ((one * 0.5 + two @ w, one, fixed, row), fixed * one + before @ w)

    (one, two, fixed, before), ys = bc.scan(step, (a, a * 2, a + 1, a - 1), x)
    return one, two, fixed, before, ys


def split(a: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Operations of several results, on both sides of the loop and in it."""

    def step(h: Tensor, row: Tensor) -> Both:
        one, two = (row @ w).split(2, -1)
        left, right = h.split(2, -1)
        h = torch.cat([left + one.sigmoid(), right * two], -1)
        return h, torch.linalg.slogdet(torch.eye(4, dtype=h.dtype) * 3 + 0.1 * h.t() @ h)[1]

    return bc.scan(step, a, x)


def filtered(a: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Factorisations of which a derivative reads more than the round itself, and one that is split before the loop."""
    noise = torch.eye(4, dtype=torch.float64) * 2 + w @ w.t()

    def step(carry: Both, row: Tensor) -> tuple[Both, Tensor]:
        mean, spread = carry
        whole = spread + noise
        gain = torch.linalg.solve(whole, spread).t()
        first, second = row[0].split(2, -1)
        rest = torch.cat([second, first]) - mean
        value = (
            torch.logdet(whole) + rest @ torch.linalg.solve(whole, rest) + torch.linalg.cholesky(whole).diagonal().sum()
        )
        return (mean + gain @ rest, spread - gain @ spread + 0.1 * noise), value

    (mean, _), values = bc.scan(step, (a[0], noise * 0.5), x)
    return mean, values


def nested(a: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """A scan in every round over what it is given, which does not wait, and one that does."""

    def step(h: Tensor, row: Tensor) -> Both:
        _, sums = bc.scan(lambda s, one: (s + one @ w, s.sin()), row[0], row)
        last, _ = bc.scan(lambda s, one: ((s @ w).tanh() + one, s), h, row)
        return last + sums.sum(0), sums

    return bc.scan(step, a[0], x)


CASES: dict[str, tuple[Callable[..., tuple[Tensor, ...]], int, int]] = {
    "recurrent": (recurrent, 1, 1),
    "reverse": (functools.partial(recurrent, reverse=True), 1, 1),
    "narrow": (narrow, 0, 0),
    "summed": (summed, 0, 0),
    "shifted": (shifted, 1, 1),
    "split": (split, 0, 0),
    "filtered": (filtered, 1, 3),
    "nested": (nested, 1, 0),
}
"""Function; products that are left in the rounds, of it and of its gradient."""


def gradient(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Value and gradient of a function of its results."""
    graph = simplify(to_graph(function, A.clone(), W.clone(), X.clone()), differentiable=True)

    def run(a: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (a, w, x)]
            made = graph(*leaves)
            value = sum((m * torch.arange(1, m.numel() + 1).reshape(m.shape)).sin().sum() for m in made)
            slopes = torch.autograd.grad(value, leaves)  # type: ignore[arg-type]
        return (value.detach(), *slopes)  # type: ignore[union-attr]

    return run


def traced(function: Callable[..., tuple[Tensor, ...]], *, derived: bool = False) -> GraphModule:
    function = gradient(function) if derived else function
    return simplify(to_graph(function, A.clone(), W.clone(), X.clone(), functional=not derived))


vectorised = functools.partial(over_draws, vectorise=True)


def shortened(graph: GraphModule) -> GraphModule:
    return with_short_rounds(graph, [A, W, X], vectorised)


def products(graph: GraphModule) -> list[int]:
    return [sum(n.target in PRODUCTS for n in body.plain.graph.nodes) for _, body, _ in scans(graph)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("derived", [False, True])
def test_shorter_rounds_give_the_same(name: str, derived: bool) -> None:
    function, *left = CASES[name]
    graph = traced(function, derived=derived)
    short = shortened(graph)
    assert short is not graph
    assert sum(products(short)) == (sum(left) if derived else left[0]), products(short)
    assert sum(products(short)) < sum(products(graph)) or name in ("narrow", "filtered", "nested")
    for args in ((A, W, X), (A.flip(0).contiguous(), W.t().contiguous(), X.flip(0).contiguous())):
        for ours, right in zip(short(*args), graph(*args), strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_sums_of_what_is_no_float_stay_as_they_are(kind: torch.dtype) -> None:
    """Bytes wrap round, and truths stay truths."""

    def counted(a: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        start = torch.zeros((), dtype=kind)
        total, _ = bc.scan(lambda s, row: (s + (row[0, 0].abs() * w[0, 0] * 100).to(kind), row), start, x)
        return (total.to(x.dtype) * 2,)

    graph = traced(counted)
    short = simplified(graph, A, W * 0, X)
    assert torch.equal(short(A, W, X)[0], graph(A, W, X)[0])


def test_rounds_that_wait_for_nothing_are_no_loop() -> None:
    assert not scans(shortened(traced(summed)))
    assert scans(traced(summed))


@pytest.mark.parametrize("name", CASES)
def test_every_draw_and_seed_has_its_own(name: str) -> None:
    """Mapped before and after the rounds are shortened."""
    graph = traced(CASES[name][0], derived=True)
    many = [torch.stack([t, t.flip(0), -t]) for t in (A, W, X)]
    right = [torch.stack(parts) for parts in zip(*(graph(*args) for args in zip(*many, strict=True)), strict=True)]
    for inner in (graph, shortened(graph)):
        short = simplified(vectorised(inner, [True] * 3), *many)
        for ours, expected in zip(short(*many), right, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


def test_what_would_be_large_stays_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = traced(recurrent, derived=True)
    monkeypatch.setattr(rounds, "MOST", T * 16 - 1)
    short = shortened(graph)
    assert sum(products(short)) > sum(products(graph)) / 3  # power: they leave it where they may
    for ours, right in zip(short(A, W, X), graph(A, W, X), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


def test_plain_rounds_of_large_tensors_stay_as_they_are() -> None:
    """Laid out for all rounds their numbers would take longer to read than to compute."""

    def plain(a: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return bc.scan(lambda s, row: (s * 0.5 + row.exp(), s.sin()), a, x)

    graph = traced(plain)
    assert shortened(graph) is graph


def test_what_no_vmap_can_do_stays_as_it_is() -> None:
    def refused(*_: Any) -> Any:
        raise RuntimeError("no batching rule")

    graph = traced(recurrent)
    assert with_short_rounds(graph, [A, W, X], lambda function, mapped: refused) is graph
