"""The measure of families on known targets, at its cheapest."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import bbvi_conv as bc


@pytest.fixture(scope="module")
def kl() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "bbvi_theory" / "kl.py"
    spec = importlib.util.spec_from_file_location("example_kl", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_flow_loses_at_most_a_third_of_what_full_rank_does_on_the_banana(kl: ModuleType) -> None:
    module, cheap = kl.target("banana"), {"engine": "traced", "count": 5_000}
    gaussian = kl.run(module, bc.FullRank(1.0), 0.05, 150, 0, **cheap)
    flow = kl.run(module, bc.IAF(num_layers=2, init_scale=1.0, hidden=(8,)), 0.03, 350, 0, **cheap)
    assert gaussian.kl > 0.4  # no Gaussian fits
    assert flow.kl + 4 * flow.error < gaussian.kl / 3
    assert flow.kl > -4 * flow.error
    assert gaussian.left == pytest.approx(0.5, abs=0.1)


def test_the_budget_is_in_seconds(kl: ModuleType) -> None:
    module = kl.target("two_modes")
    assert kl.affordable(module, bc.FullRank(), 0.0, engine="traced") == 1
    assert kl.affordable(module, bc.FullRank(), 10.0, engine="traced") > 100
