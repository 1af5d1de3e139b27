"""Fewer operations for the same function."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from bbvi_conv.program.aten_graph import Untraceable, to_graph
from bbvi_conv.program.graphs import lift, simplify
from bbvi_conv.program.trace import over_draws, simplified


def fresh(x: Tensor) -> tuple[Tensor, ...]:
    """As torch writes 1 - x in the derivative of silu."""
    return (torch.empty_like(x).fill_(1).sub_(x) * x, x.exp().mul_(2).add_(x))


def shared(x: Tensor) -> tuple[Tensor, ...]:
    """What a view of it reads, a copy keeps, and another of the same kind does not see."""
    changed, other = torch.zeros_like(x), torch.zeros_like(x)
    row, copy = changed.view(-1), changed.clone()
    changed.add_(x)
    return row, copy, other, copy.add_(1)


def part_filled(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of what is read as a whole; and something new as a whole."""
    changed = x.exp()
    changed[0].fill_(2.0)
    changed[1, 1:].zero_()
    changed[1, 0].fill_(x.sum())
    return (changed * torch.empty_like(x).fill_(3.0),)


@pytest.mark.parametrize(("function", "left"), [(fresh, 0), (shared, 1), (part_filled, 3)])
def test_what_changes_memory_that_nothing_else_reads_gives_anew(
    function: Callable[[Tensor], tuple[Tensor, ...]], left: int
) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    graph = to_graph(function, x, functional=False)

    def changing() -> int:
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        return sum(target._schema.is_mutable for target in targets)

    assert changing() > left
    simplify(graph)
    assert changing() == left
    for ours, expected in zip(graph(x), function(x), strict=True):
        assert torch.equal(ours, expected)


def filled(x: Tensor) -> tuple[Tensor, ...]:
    """As torch writes the derivative of silu, and a sum that begins with nothing."""
    return (torch.empty_like(x).fill_(1).sub_(x) * x, torch.empty_like(x).zero_().add_(x))


WHOLE = {
    "scaled": lambda n, b: (0.1 * n, n - 0.1, n / 3, n / (n + 2), 1 / n, n**0.3, 0.3**n),
    "functions": lambda n, b: (n.sin(), n.exp(), torch.sigmoid(n), torch.lgamma(n), torch.log1p(n), n.clamp(min=0.1)),
    "of two": lambda n, b: (torch.atan2(n, n + 1), torch.xlogy(n, n), torch.tensor(0.1) + n, b.sum() * 0.1),
    "chosen": lambda n, b: (torch.where(b, 0.1, 0.2), torch.where(b, n, 0.2), torch.where(b, 0.1, n), b * 0.1),
    # of torch's rules: a vector of float32, made of whole numbers, makes float32 of a single number of float64
    "from data": lambda n, b: (torch.tensor(1 / 3, dtype=torch.float64) - 2.0 * n,),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_become_floats_of_tracing_time(name: str) -> None:
    """A program's float type is torch's default while it is traced, and need not be when the graph runs."""
    n = torch.arange(1, 9)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        graph, right = to_graph(WHOLE[name], n, n > 3), WHOLE[name](n, n > 3)
    finally:
        torch.set_default_dtype(before)
    assert before is torch.float32
    assert any(not torch.equal(a, b) for a, b in zip(WHOLE[name](n, n > 3), right, strict=True))  # power
    for found, expected in zip(graph(n, n > 3), right, strict=True):
        assert found.dtype is torch.float64
        assert torch.equal(found, expected)


@torch.library.custom_op("bbvi_conv_tests::looked_up", mutates_args=())
def looked_up(at: Tensor) -> Tensor:
    return torch.arange(10.0, dtype=torch.float64)[at]


looked_up.register_fake(lambda at: at.new_empty(at.shape, dtype=torch.float64))


@pytest.mark.parametrize("function", [looked_up, lambda at: at.view(torch.float64) + 1.0])
def test_whole_numbers_that_are_no_numbers_stay(function: Callable[[Tensor], Tensor]) -> None:
    """Indices of an operation of a user's own, and bits that are read as another type."""
    at = torch.tensor([3, 1, 2])
    assert torch.equal(to_graph(function, at)(at), function(at))


def test_what_is_filled_is_mapped_without_a_loop(capfd: pytest.CaptureFixture[str]) -> None:
    """torch says so on stderr where it maps an operation one by one, which is slow."""
    x = torch.arange(6.0).reshape(2, 3)
    graph = simplify(to_graph(filled, x, functional=False))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = torch.func.vmap(graph)(x)
    assert not said
    assert "batching rule" not in capfd.readouterr().err
    for ours, expected in zip(made, filled(x), strict=True):
        assert torch.equal(ours, expected)


def of_gram(w: Tensor) -> Tensor:
    """A function of W W^T, as a layer with a bounded norm has it."""
    gram = w @ w.T
    return (w * (256.0 + (gram.square() * gram.exp()).sum()) ** -0.25).sum()


def of_gram_and_rows(w: Tensor) -> Tensor:
    """A function of W W^T times a row, which is not symmetric."""
    return ((w @ w.T) * w[:, 0]).sum()


def of_two(w: Tensor) -> Tensor:
    """Of a product with another matrix's transpose."""
    return (w @ (2 * w).exp().T).square().sum()


@pytest.mark.parametrize(("function", "products"), [(of_gram, 2), (of_gram_and_rows, 3), (of_two, 3)])
def test_the_two_halves_of_a_symmetric_gradient_are_computed_once(
    function: Callable[[Tensor], Tensor], products: int
) -> None:
    w = 0.1 * torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient = torch.func.grad(function)
    graph = to_graph(lambda w: (gradient(w),), w, functional=False)
    made = [node.target for node in simplify(graph).graph.nodes]
    used = [target for target in made if target is torch.ops.aten.mm.default]
    assert len(used) == products
    torch.testing.assert_close(graph(w)[0], gradient(w))


def test_transposes_that_undo_each_other_are_left_out() -> None:
    def turned(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (x.t().transpose(0, 1) + x.permute(1, 0).permute(-1, -2) + x.permute(0, 1), y.permute(1, 2, 0), x.t())

    x, y = torch.randn(2, 3), torch.randn(2, 3, 4)
    graph = to_graph(turned, x, y, functional=False)
    simplify(graph)
    left = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert len(left) == 5
    for ours, expected in zip(graph(x, y), turned(x, y), strict=True):
        assert torch.equal(ours, expected)


def test_what_is_changed_through_a_view_is_symmetric_no_more() -> None:
    def changed(w: Tensor) -> tuple[Tensor, ...]:
        gram = w @ w.T
        gram[0].fill_(2.0)
        return (gram - gram.t(),)

    w = torch.randn(4, 6)
    graph = simplify(to_graph(changed, w, functional=False))
    assert torch.equal(graph(w)[0], changed(w)[0])
    assert changed(w)[0].any()  # power


TABLE = torch.arange(12.0, dtype=torch.float64).reshape(3, 4) / 7
PLACES, TWICE, COUNTED = torch.tensor([2, 0, 1]), torch.tensor([0, 0, 2]), torch.tensor([[0], [1], [2]])


def in_order(x: Tensor) -> Tensor:
    return x[torch.arange(3).reshape(3, 1)].square()


def a_part(x: Tensor) -> Tensor:
    return x[:, torch.arange(1, 3).reshape(2, 1, 1)].exp()


def constant_in_order(x: Tensor) -> Tensor:
    return x[COUNTED].sin()


def out_of_order(x: Tensor) -> Tensor:
    return x[PLACES].square() + x[TWICE]


LOOK_UPS = {in_order: 0, a_part: 0, constant_in_order: 0, out_of_order: 4}


@pytest.mark.parametrize("function", LOOK_UPS)
@pytest.mark.parametrize("mapped", [False, True])
def test_entries_in_their_order_are_not_looked_up(function: Callable[[Tensor], Tensor], mapped: bool) -> None:
    """Neither they nor their gradients; over one table and over several."""

    def value_and_slope(x: Tensor) -> tuple[Tensor, ...]:
        def total(x: Tensor) -> Tensor:
            return (function(x) * torch.linspace(0.5, 1.5, function(x).numel()).reshape(function(x).shape)).sum()

        return function(x), torch.func.grad(total)(x)

    x = torch.stack([TABLE, TABLE.cos()]) if mapped else TABLE
    run = over_draws(value_and_slope, [True], vectorise=True) if mapped else value_and_slope
    graph = simplify(to_graph(run, x, functional=False))
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum("index" in name for name in names) == LOOK_UPS[function]
    torch.testing.assert_close(tuple(graph(x)), tuple(run(x)))


def test_what_follows_from_constants_is_computed_once() -> None:
    counts = torch.tensor([0.0, 3.0, 1.0, 7.0], dtype=torch.float64)

    def log_poisson(rate: Tensor) -> tuple[Tensor, ...]:
        each = torch.distributions.Poisson(rate.reshape(3, 1), validate_args=False).log_prob(counts)
        return each.sum(), torch.arange(4) * rate[0], counts.sum() * rate

    rate = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    graph = simplify(to_graph(log_poisson, rate, functional=False))
    assert not any(node.target is torch.ops.aten.lgamma.default for node in graph.graph.nodes)
    for ours, expected in zip(graph(rate), log_poisson(rate), strict=True):
        torch.testing.assert_close(ours, expected)
    _, constants = lift(graph, numbers=True)
    assert max(constant.numel() for constant in constants) == 4  # one row of three that are alike


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numbers", [False, True])
def test_single_numbers_are_inputs_where_wanted(numbers: bool, dtype: torch.dtype) -> None:
    """A prior by the data's mean and standard deviation, and any other, then leave the code as it is."""

    def lifted(scale: float, shift: float) -> tuple[str, list[Tensor]]:
        y = torch.tensor([scale, 3.0, -1.0], dtype=dtype)

        def log_density(x: Tensor) -> Tensor:
            prior = torch.distributions.Normal(y.mean(), shift * y.std(), validate_args=False)
            more = torch.full((), shift, dtype=dtype) * x.sum() + 10 * torch.tensor(0.0, dtype=dtype)
            return prior.log_prob(x).sum() + more * (y > 0).sum()

        graph, constants = lift(simplify(to_graph(log_density, x, functional=False)), numbers=numbers)
        torch.testing.assert_close(graph(x, *constants), log_density(x))
        return graph.code, constants

    x = torch.tensor([0.5, -1.0], dtype=dtype)
    (code, constants), (other_code, others) = lifted(0.7, 2.5), lifted(1.9, 0.3)
    assert (code == other_code) is numbers
    assert [t.numel() for t in constants] == [t.numel() for t in others] == [1] * len(constants)
    assert bool(constants) is numbers
    assert ("2.5" in code) is not numbers


@pytest.mark.parametrize(
    ("number", "written"),
    [
        *((0.0, True), (-1.0, True), (1, True), (True, True), (math.inf, True), (math.nan, True)),
        *((0.5, False), (2.0, False), (12, False), (1 + 2j, False)),
    ],
)
def test_numbers_that_make_others_simpler_are_written(number: complex, written: bool) -> None:
    graph = to_graph(lambda x: x * torch.tensor(number), torch.ones(2), functional=False)
    lifted, constants = lift(graph, numbers=True)
    assert (not constants) is written
    torch.testing.assert_close(lifted(torch.ones(2), *constants), graph(torch.ones(2)), equal_nan=True)


def test_a_number_that_is_changed_is_made_anew() -> None:
    def function(x: Tensor) -> Tensor:
        total = torch.full((), 7.0)
        total.reshape(1).add_(x.sum())
        return total * x

    graph, constants = lift(to_graph(function, torch.ones(2), functional=False), numbers=True)
    assert not constants
    for _ in range(2):
        torch.testing.assert_close(graph(torch.ones(2)), torch.full((2,), 9.0))


def test_large_results_of_small_constants_are_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    side = torch.linspace(0.0, 1.0, 2000, dtype=torch.float64)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        apart = (side.reshape(-1, 1) - side).square()
        return apart * x, apart.sum(0) * x  # the sum is small, what it is a sum of is not

    monkeypatch.setattr("bbvi_conv.program.constants.LARGE", 2**24)
    graph = simplify(to_graph(function, torch.ones(()), functional=False))
    assert sum(c.numel() for c in lift(graph, numbers=True)[1]) <= 4000
    torch.testing.assert_close(tuple(graph(torch.ones(()))), function(torch.ones(())))


def test_what_is_changed_in_place_is_no_constant() -> None:
    """Neither by itself nor through a view of it."""
    start = torch.zeros(3)

    def counted(x: Tensor) -> tuple[Tensor, ...]:
        total, other = start.exp(), start.cos()
        other.reshape(3, 1).select(1, 0).add_(x)
        return total.add_(x), total * 2, other * 2

    graph = simplify(to_graph(counted, torch.ones(3), functional=False))
    for _ in range(2):
        _, total, other = graph(torch.ones(3))
        assert torch.equal(total, torch.full((3,), 4.0))
        assert torch.equal(other, torch.full((3,), 4.0))


def test_constants_kept_once_are_still_one_block_for_a_view() -> None:
    weights = torch.linspace(0.1, 0.4, 4, dtype=torch.float64)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        spread = weights.expand(3, 4).exp()  # three rows that are alike
        return (x.reshape(6, 2) * torch.ops.aten._unsafe_view(spread, [6, 2]),)

    x = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    graph = simplify(to_graph(function, x, functional=False))
    torch.testing.assert_close(graph(x)[0], function(x)[0])
    assert not any(node.target is torch.ops.aten.exp.default for node in graph.graph.nodes)


def kept(x: Tensor) -> tuple[Tensor, ...]:
    """A copy and a sum of what is changed afterwards: an in-place product keeps what its derivative needs."""
    product = x.exp()
    copy, total = product.clone(), product.sum()
    product.mul_(x)
    return copy, total, product.sum(), product


def by_parts(x: Tensor) -> tuple[Tensor, ...]:
    """As a recurrent cell writes it: parts of a tensor that is nobody's, one changed by another."""
    first, second = torch.unsafe_split(x.exp(), 1)
    before = first.clone()
    first.add_(second).sigmoid_()
    return before, first, second.clone(), before.sin()


def twice(x: Tensor) -> tuple[Tensor, ...]:
    """The same question before and after a change."""
    state = x.exp()
    before = state.sin()
    state[0] += 1.0
    return before, state.sin()


@pytest.mark.parametrize("function", [kept, by_parts, twice])
def test_what_is_changed_later_is_not_taken_for_what_it_was(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    graph = simplify(to_graph(function, x, functional=False))
    for ours, expected in zip(graph(x), function(x), strict=True):
        torch.testing.assert_close(ours, expected)
    for ours, expected in zip(simplified(function, x)(x), function(x), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_simpler_graph_that_gives_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: GraphModule) -> GraphModule:
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default):
            node.target = torch.ops.aten.cos.default
        graph.recompile()
        return graph

    monkeypatch.setattr("bbvi_conv.program.trace.simplify", wrong)
    assert torch.equal(simplified(lambda x: (x.exp(),), torch.ones(2))(torch.ones(2))[0], torch.ones(2).exp())
    with pytest.raises(Untraceable, match="does not give what it was made from"):
        simplified(lambda x: (x.exp(), x.sin()), torch.ones(2))
