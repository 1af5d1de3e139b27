"""A cheaper form has the value and the gradient of the function it stands for, and is used only where it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.forms import FORMS
from bbvi_conv.program.tape import Tape, taped

LOGITS = [0.0, 1e-300, 1e-4, 0.3, 5.0, 19.9, 20.1, 39.9, 40.1, 100.0, 709.0, 1e4]
TARGETS = [0.0, 0.25, 1.0]


def grid(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = torch.tensor([sign * x for x in LOGITS for sign in (1, -1)], dtype=dtype)
    x, y = torch.meshgrid(logits, torch.tensor(TARGETS, dtype=dtype), indexing="ij")
    return x.clone().requires_grad_(), y.clone().requires_grad_()


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope in the logit, in float64 and without cancellation: y softplus(-x) + (1 - y) softplus(x)."""
    x, y = x.detach().double(), y.detach().double()
    tail = torch.log1p(torch.exp(-x.abs()))
    below, above = tail + x.clamp(min=0), tail + (-x).clamp(min=0)
    return (1 - y) * below + y * above, (1 - y) * torch.sigmoid(x) - y * torch.sigmoid(-x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_at_extreme_logits(dtype: torch.dtype) -> None:
    x, y = grid(dtype)
    value = FORMS[functional.binary_cross_entropy_with_logits](x, y, reduction="none")
    slope, in_target = torch.autograd.grad(value.sum(), (x, y), create_graph=True)
    right, right_slope = exact(x, y)
    eps = torch.finfo(dtype).eps
    assert ((value.double() - right).abs() <= 4 * eps * x.detach().double().abs().clamp(min=1)).all()
    assert ((slope.double() - right_slope).abs() <= 4 * eps).all()
    assert torch.equal(in_target, -x)
    curvature = torch.autograd.grad(slope.sum(), x)[0].double()
    sigmoid = torch.sigmoid(x.detach().double())
    assert ((curvature - sigmoid * torch.sigmoid(-x.detach().double())).abs() <= 4 * eps).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bernoulli_on_the_tape_is_torchs_own(dtype: torch.dtype) -> None:
    x, y = grid(dtype)
    y = y.detach().round()

    def density(x: Tensor) -> Tensor:
        return dist.Bernoulli(logits=x, validate_args=False).log_prob(y)

    expected = density(x)
    with taped(Tape(None, {})):
        got = density(x)
    atol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, rtol=atol, atol=40 * atol)  # 40: the largest logit that still cancels
    torch.testing.assert_close(
        *(torch.autograd.grad(z.sum(), x)[0] for z in (got, expected)), rtol=atol, atol=atol, msg="gradients differ"
    )


def test_the_form_is_what_a_graph_holds() -> None:
    def loss(x: Tensor) -> Tensor:
        with taped(Tape(None, {})):
            return dist.Bernoulli(logits=x, validate_args=False).log_prob(torch.ones(3)).sum()

    names = {str(node.target) for node in to_graph(loss, torch.zeros(3)).graph.nodes}
    assert "aten.softplus.default" in names
    assert "aten.clamp_min.default" not in names  # torch's own form, taken apart


OTHER: dict[str, Callable[[Tensor, Tensor], dict[str, Any]]] = {
    "mean": lambda x, y: {},
    "sum": lambda x, y: {"reduction": "sum"},
    "weight": lambda x, y: {"reduction": "none", "weight": torch.rand_like(x)},
    "pos_weight": lambda x, y: {"reduction": "none", "pos_weight": torch.rand_like(x)},
}


@pytest.mark.parametrize("options", OTHER)
def test_other_options_are_torchs(options: str) -> None:
    x, y = (part.detach() for part in grid(torch.float64))
    given = OTHER[options](x, y)
    expected = functional.binary_cross_entropy_with_logits(x, y, **given)
    with taped(Tape(None, {})):
        assert torch.equal(functional.binary_cross_entropy_with_logits(x, y, **given), expected)


def test_a_wrong_shape_is_still_refused_by_torch() -> None:
    with taped(Tape(None, {})), pytest.raises(ValueError, match="must be the same as input size"):
        functional.binary_cross_entropy_with_logits(torch.zeros(3), torch.zeros(4), reduction="none")


def test_entries_at_places_that_are_drawn() -> None:
    """``x[i]`` of a place that is computed is traced; torch would ask for its value."""
    table = torch.arange(12.0).reshape(3, 4)

    def look_up(at: Tensor) -> tuple[Tensor, ...]:
        first, second = at[0], at[1]
        return table[first], table[first, second], table[-first - 1], table[:, 1], table[at]

    at = torch.tensor([2, 1])

    def function(at: Tensor) -> tuple[Tensor, ...]:
        with taped(Tape(None, {})):
            return look_up(at)

    graph = to_graph(function, torch.tensor([0, 0]))
    for ours, expected in zip(graph(at), look_up(at), strict=True):
        assert torch.equal(ours, expected)


def test_numbers_filled_in_place_through_a_mask() -> None:
    """Whole tensors, parts of them and copies of data, with the gradients of what is kept."""
    data = torch.zeros(2, 3)

    def fill(x: Tensor) -> Tensor:
        y, z = 2 * x, data.clone()
        filled = y.masked_fill_(x < 0, -1.0)
        y[:, 1:].masked_fill_(torch.tensor([True, False]), x[0, 0])
        z.masked_fill_(x > 1, x[1, 1])
        return filled * z

    def function(x: Tensor) -> Tensor:
        with taped(Tape(None, {}, mark_no_grad=True)):
            return fill(x)

    x = torch.tensor([[-1.0, 0.5, 2.0], [3.0, 4.0, -0.5]])
    graph = to_graph(function, torch.zeros(2, 3))
    assert torch.equal(graph(x), fill(x))
    slopes = [torch.func.grad(lambda x, f=f: f(x).sum())(x) for f in (graph, fill)]
    assert torch.equal(*slopes)
    with taped(Tape(None, {})), pytest.warns(UserWarning, match="expanded"):
        shared = torch.zeros(1).expand(3).masked_fill_(torch.tensor([True, True, True]), 2.0)
    assert torch.equal(shared, torch.full((3,), 2.0))
    assert slopes[0].abs().sum() > 0


def test_numbers_limited_and_added_in_place() -> None:
    """As samples of gamma and multinomial distributions are, with the gradients of what is kept."""
    index, counts = torch.tensor([0, 2, 0, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0])

    def limit(x: Tensor) -> Tensor:
        y = 2 * x
        y[1:].clamp_(min=-1.0, max=0.5)
        return y.scatter_add_(0, index, counts * x[0]) * x

    def function(x: Tensor) -> Tensor:
        with taped(Tape(None, {}, mark_no_grad=True)):
            return limit(x)

    x = torch.tensor([-1.0, 0.2, 2.0])
    graph = to_graph(function, torch.zeros(3))
    assert torch.equal(graph(x), limit(x))
    slopes = [torch.func.grad(lambda x, f=f: f(x).sum())(x) for f in (graph, limit)]
    assert torch.equal(*slopes)
    assert slopes[0].abs().sum() > 0


def test_one_hot_asks_for_no_values() -> None:
    y = torch.tensor([[0, 2], [1, 0]])
    with taped(Tape(None, {})):
        graph = to_graph(lambda y: (functional.one_hot(y, 3) * 2,), y)
    assert torch.equal(graph(y.flip(0))[0], functional.one_hot(y.flip(0), 3) * 2)
    assert FORMS[functional.one_hot](y) is NotImplemented  # as many classes as the values tell
