"""The measure of families on known targets, at its cheapest."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import bbvi_conv as bc
from bbvi_conv.model_file import load_module

families = load_module(str(Path(__file__).parents[2] / "examples" / "bbvi_families.py"))


def test_a_flow_loses_at_most_a_third_of_what_full_rank_does_on_the_banana(shipped) -> None:
    module, cheap = shipped("banana"), {"engine": "traced", "count": 5_000}
    gaussian = families.run(module, bc.FullRank(1.0), 0.05, 150, 0, **cheap)
    flow = families.run(module, bc.IAF(num_layers=2, init_scale=1.0, hidden=(8,)), 0.03, 350, 0, **cheap)
    # a Gaussian loses at least log 2 + s^2 / 8 + s^4 / 4 - log s - 1/2 at s^4 + s^2 / 4 = 1, by symmetry in x
    s2 = (math.sqrt(65) - 1) / 8
    least = math.log(2) + s2 / 8 + s2**2 / 4 - 0.5 * math.log(s2) - 0.5
    assert gaussian.kl > least - 4 * gaussian.error
    assert flow.kl + 4 * flow.error < gaussian.kl / 3
    assert flow.kl > -4 * flow.error
    assert gaussian.left == pytest.approx(0.5, abs=0.1)


def test_the_table_sets_families_beside_full_rank_and_writes_no_infinity() -> None:
    def results(*kls: float) -> list[object]:
        return [families.Result(kl, 0.1, 7, 0.5, 1.0) for kl in kls]

    made = {"full-rank": (1.0, 3.0, 2.0), "iaf": (0.5, 0.25, math.inf), "sylvester": (math.inf, math.inf, 1.0)}
    rows = [families.row_of("banana", name, results(*kls)) for name, kls in made.items()]
    assert [row["kl_nats"] for row in rows] == [2.0, 0.5, None]
    json.dumps(rows, allow_nan=False)
    table = families.markdown(rows)
    assert "| full-rank | 2.0000 |" in table
    assert "| iaf | 0.5000 (0.25) |" in table
    assert "| sylvester | infinite |" in table


def test_the_budget_is_in_seconds(shipped) -> None:
    module = shipped("two_modes")
    assert families.affordable(module, bc.FullRank(), 0.0, engine="traced") == 1
    assert families.affordable(module, bc.FullRank(), 10.0, engine="traced") > 100
