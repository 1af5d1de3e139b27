"""The measure of families on known targets, at its cheapest."""

from __future__ import annotations

from pathlib import Path

import pytest

import bbvi_conv as bc
from bbvi_conv.model_file import load_module

families = load_module(str(Path(__file__).parents[2] / "examples" / "bbvi_families.py"))


def test_a_flow_loses_at_most_a_third_of_what_full_rank_does_on_the_banana(shipped) -> None:
    module, cheap = shipped("banana"), {"engine": "traced", "count": 5_000}
    gaussian = families.run(module, bc.FullRank(1.0), 0.05, 150, 0, **cheap)
    flow = families.run(module, bc.IAF(num_layers=2, init_scale=1.0, hidden=(8,)), 0.03, 350, 0, **cheap)
    assert gaussian.kl > 0.4  # no Gaussian fits
    assert flow.kl + 4 * flow.error < gaussian.kl / 3
    assert flow.kl > -4 * flow.error
    assert gaussian.left == pytest.approx(0.5, abs=0.1)


def test_the_budget_is_in_seconds(shipped) -> None:
    module = shipped("two_modes")
    assert families.affordable(module, bc.FullRank(), 0.0, engine="traced") == 1
    assert families.affordable(module, bc.FullRank(), 10.0, engine="traced") > 100
