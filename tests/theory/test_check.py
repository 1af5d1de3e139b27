"""Each condition of the theorems is told apart: what is built in holds, what is violated fails, the rest is unknown."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.families import Exp, Linear
from bbvi_conv.families import SoftClip as SoftClipMap

IMAGES = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
MINIBATCH = bc.Minibatch(8, plate="data")


def test_a_bounded_smooth_vae_under_the_theorems_adam_fails_nothing(coder) -> None:
    model, guide = coder(bc.bounded_mlp([6, 5, 4], -3.0, 3.0), bc.bounded_mlp([2, 5, 6], -1.0, 1.0))
    found = bc.assumptions(model, guide, bc.TheoremAdam(0.01, radius=50.0), (IMAGES,), minibatch=MINIBATCH)
    assert {c.status for c in found.conditions} == {"holds"}
    assert {c.name for c in found.conditions} == {
        "step size C / sqrt(n)",
        "beta1 < sqrt(beta2) < 1",
        "parameters in a ball",
        "smooth activations",
        "bounded outputs",
        "scales bounded away from zero",
    }
    terms = {t.name: t.value for t in found.terms}
    size = (6 * 5 + 5) + (5 * 4 + 4) + (2 * 5 + 5) + (5 * 6 + 6)
    assert terms["d*"] == size
    assert terms["N"] == 4
    assert terms["N a^(2(N-1)) d* / (1 - beta1)"] == pytest.approx(4 * 50.0**6 * size / 0.1)
    assert terms["1 / (B K)"] == 1 / 8


def test_a_plain_vae_fails_where_it_should(coder) -> None:
    encoder = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    decoder = nn.Sequential(nn.Linear(2, 5), nn.PReLU(), nn.Linear(5, 6))
    optimiser = bc.Adam(bc.Constant(1e-3), beta1=0.99, beta2=0.9)
    found = bc.assumptions(*coder(encoder, decoder), optimiser, (IMAGES,), minibatch=MINIBATCH)
    told = {(c.name, c.where.split()[-2] if "network" in c.where else ""): c for c in found.conditions}
    assert told[("step size C / sqrt(n)", "")].status == "fails"
    assert told[("beta1 < sqrt(beta2) < 1", "")].status == "fails"
    assert told[("parameters in a ball", "")].status == "unknown"
    assert told[("smooth activations", "guide")].status == "fails"
    assert "1 (ReLU)" in told[("smooth activations", "guide")].why
    assert told[("bounded outputs", "guide")].status == "fails"
    assert told[("smooth activations", "model")].status == "unknown"
    assert "PReLU" in told[("smooth activations", "model")].why
    assert told[("bounded outputs", "model")].status == "fails"
    assert told[("scales bounded away from zero", "")].status == "fails"
    assert len(found.failing) == 6


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(6, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.relu(self.inside(x))


def test_a_module_of_the_users_own_is_unknown(coder) -> None:
    model, guide = coder(Own(), bc.bounded_mlp([2, 6], -1.0, 1.0))
    found = bc.assumptions(model, guide, bc.SGD(), (IMAGES,), minibatch=MINIBATCH)
    told = [c for c in found.conditions if c.where == "network of the guide (Own)"]
    assert [c.status for c in told] == ["unknown", "unknown"]
    assert found.status("scales bounded away from zero") == "unknown"
    assert "beta1 < sqrt(beta2) < 1" not in {c.name for c in found.conditions}


SCALES = [
    (Linear(), bc.ProjectedSGD(floor=0.01), "holds", "at least 0.01"),
    (Linear(), bc.ProximalSGD(), "unknown", "no fixed amount"),
    (Linear(), bc.SGD(), "fails", "may come near zero or cross it"),
    (SoftClipMap(0.05, 5.0), bc.Adam(), "holds", "at least 0.05"),
    (Exp(), bc.Adam(), "fails", "every positive number"),
    (Exp(), bc.TheoremAdam(0.1, 3.0), "holds", "at least 0.0498"),
]


@pytest.mark.parametrize(("scale_map", "optimiser", "status", "why"), SCALES)
def test_scales_by_map_and_optimiser(
    shipped: Callable[[str], ModuleType], scale_map: Any, optimiser: Any, status: str, why: str
) -> None:
    challenger = shipped("challenger")
    found = bc.assumptions(challenger.model, bc.MeanField(0.3, scale_map), optimiser, challenger.data())
    told = [c for c in found.conditions if c.name == "scales bounded away from zero"]
    assert {c.status for c in told} == {status}
    assert all(why in c.why for c in told)
    assert len(told) == 2


def test_a_convex_row_of_the_theory_holds(shipped: Callable[[str], ModuleType]) -> None:
    challenger = shipped("challenger")
    family = bc.FullRank(0.3, Linear())
    given: dict[str, Any] = {"optimiser": bc.ProximalSGD(bc.Constant(0.02)), "args": challenger.data()}
    found = bc.assumptions(challenger.model, family, **given)
    for name in (
        "location-scale family",
        "linear parameterisation",
        "estimator goes with the optimiser",
        "log-concave target",
    ):
        assert found.status(name) == "holds"
    assert found.status("step size at most 1 / L") == "unknown"
    wrong = bc.assumptions(challenger.model, family, objective=bc.ELBO(1, "sticking-the-landing"), **given)
    assert wrong.status("estimator goes with the optimiser") == "fails"
    steep = bc.assumptions(challenger.model, family, bc.ProximalSGD(bc.Constant(5.0)), challenger.data())
    assert steep.status("step size at most 1 / L") == "fails"
    nonlinear = bc.assumptions(challenger.model, bc.FullRank(), bc.Adam(), challenger.data())
    assert nonlinear.status("linear parameterisation") == "fails"
    assert "step size at most 1 / L" not in {c.name for c in nonlinear.conditions}


def test_a_fit_tells_its_assumptions_and_its_climb(shipped: Callable[[str], ModuleType]) -> None:
    schools = shipped("eight_schools")
    fit = bc.fit(schools.model, args=schools.data(), max_steps=400, window=200)
    found = fit.assumptions()
    assert found.status("log-concave target") == "fails"
    climb = {t.name: t.value for t in found.terms}["L*"]
    assert climb is not None
    assert 0 < climb < 100
    first = fit.state.monitor.looks[0].bound
    assert first is not None
    assert climb == pytest.approx(fit.verdict.numbers["bound"]["value"] - first)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["conditions"][0]["theorem"].startswith("gradient")
    page = str(found)
    assert "  fails    log-concave target" in page
    assert "terms of the rate" in page
    with pytest.raises(KeyError, match="no condition 'speed'; the conditions are"):
        found.status("speed")


def test_a_flat_target_is_unknown_not_refuted() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(torch.trunc(z), 1.0).to_event(1), obs=torch.ones(2, dtype=torch.float64))

    found = bc.assumptions(model, bc.MeanField(), bc.Adam())
    assert found.status("log-concave target") == "unknown"
