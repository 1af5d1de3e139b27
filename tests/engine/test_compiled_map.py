"""Many evaluations by compiled code are those of the graph, and are compiled only where it pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.engine import compiled_map
from bbvi_conv.engine.compiled_map import CompiledMap, compiled_where_it_pays
from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.trace import over_draws

MAPPED = [True, False, True, False, True]


def evaluation(image: Tensor, weight: Tensor, row: Tensor, bias: Tensor, empty: Tensor) -> tuple[Tensor, ...]:
    """A convolution of an image, and a number; a part that is the same for all; an input without numbers."""
    made = nn.functional.conv2d(image, weight.exp(), bias, padding=1).tanh()
    return made, (made.sum(0) * row).mean() + empty.sum()


def inputs(count: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(count)
    sizes = [(count, 2, 3, 5, 5), (4, 3, 3, 3), (count, 5, 5), (4,), (count, 0)]
    given = [0.3 * torch.randn(size, generator=gen) for size in sizes]
    given[1] = given[1].permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)  # not in the order of its dimensions
    return given


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.usefixtures("two_threads")
def test_any_number_of_evaluations(lanes: int) -> None:
    example = [t[0] if mapped else t for t, mapped in zip(inputs(1), MAPPED, strict=True)]
    graph = to_graph(evaluation, *example)
    ours, theirs = CompiledMap(graph, example, MAPPED, lanes=lanes), over_draws(graph, MAPPED, vectorise=False)
    for count in (1, 2, 4, 7, 9, 1):
        given = inputs(count)
        before = [t.clone() for t in given]
        found, wanted = ours(*given), theirs(*given)
        assert len(found) == len(wanted) == 2
        for mine, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        assert all(map(torch.equal, given, before))
    assert torch.get_num_threads() == 2


def test_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_map, "REPAYS", 1_000)
    example = [t[0] if mapped else t for t, mapped in zip(inputs(1), MAPPED, strict=True)]
    graph = to_graph(evaluation, *example)
    product = to_graph(lambda a, b: (a @ b,), torch.ones(40, 40), torch.ones(40, 40))
    assert compiled_where_it_pays(graph, example, MAPPED, 1) is None
    assert compiled_where_it_pays(product, [torch.ones(40, 40)] * 2, [True, False], 10_000) is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert compiled_where_it_pays(graph, example, MAPPED, 10_000) is None
    monkeypatch.undo()
    monkeypatch.setattr(compiled_map, "REPAYS", 1_000)
    assert compiled_where_it_pays(graph, example, MAPPED, 10_000) is not None


def test_a_fit_says_the_same_by_compiled_evaluations(coder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.rand(60, 75, generator=torch.Generator().manual_seed(0))
    fits = []
    for repays in (0, float("inf")):
        monkeypatch.setattr(compiled_map, "REPAYS", repays)
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Unflatten(-1, (3, 5, 5)), nn.Conv2d(3, 4, 3, 2), nn.SiLU(), nn.Flatten())
        model, guide = coder(encoder.append(nn.Linear(16, 4)), nn.Sequential(nn.Linear(2, 75), nn.Sigmoid()))
        settings: dict[str, Any] = {"minibatch": bc.Minibatch(10, plate="data"), "max_steps": 40, "num_seeds": 2}
        settings |= {"engine": "compiled", "khat_draws": 101, "progress": False, "dtype": torch.float32}
        fit = bc.fit(model, guide, (data[:40],), held_out=(data[40:],), **settings)
        judge = fit.run.judge
        assert judge.quiet is not judge.calculus
        assert judge.quiet.compiled == judge.calculus.compiled == judge.unseen.compiled == (repays == 0)  # type: ignore[union-attr]
        known = bc.evaluate.log_likelihood(fit, (data[:25],), num_particles=30, batch=10)
        fits.append((fit, known))
    (ours, likely), (theirs, expected) = fits
    torch.testing.assert_close(ours.x, theirs.x)
    for mine, other in zip(ours.state.seeds, theirs.state.seeds, strict=True):
        assert len(mine.monitor.looks) > 5
        for one, two in zip(mine.monitor.looks, other.monitor.looks, strict=True):
            assert one.step == two.step
            assert one.noise == pytest.approx(two.noise, rel=1e-3)
            for mine_at, other_at in ((one, two), (one.held_out, two.held_out)):
                bounds = [(at.bound, at.bound_error) for at in (mine_at, other_at)]
                assert bounds[0] == pytest.approx(bounds[1], rel=1e-4)
                norms = [(at.theta.value, at.phi.value, at.total.value) for at in (mine_at, other_at)]
                assert norms[0] == pytest.approx(norms[1], rel=1e-3, abs=1e-4)
    khat = [fit.verdict.numbers["khat"]["value"] for fit in (ours, theirs)]
    assert khat[0] == pytest.approx(khat[1], abs=1e-3)
    torch.testing.assert_close(likely.values, expected.values, rtol=1e-5, atol=1e-5)
