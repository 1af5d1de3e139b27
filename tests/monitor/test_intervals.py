"""Laws of Estimate: a number with its interval, or a reason."""

from __future__ import annotations

import json

import pytest

from bbvi_conv.monitor import Estimate, unavailable
from bbvi_conv.monitor.intervals import student_quantile


def test_a_missing_number_always_carries_a_reason() -> None:
    estimate = unavailable("run more steps")
    assert not estimate.available
    assert json.loads(json.dumps(estimate.to_json())) == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "run more steps",
    }
    with pytest.raises(ValueError, match="reason must say"):
        unavailable(" ")


def test_zero_is_a_number() -> None:
    assert Estimate(0.0, 0.0, 1.0).available
    assert Estimate(0.0, 0.0, 1.0).to_json() == {"value": 0.0, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(("degrees", "table"), [(1, 12.706), (10, 2.228), (31, 2.0395), (float("inf"), 1.95996)])
def test_quantile_is_the_tabulated_one(degrees: float, table: float) -> None:
    assert student_quantile(0.95, degrees) == pytest.approx(table, abs=5e-4)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, float("nan")])
def test_an_impossible_level_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="level must lie strictly between 0 and 1"):
        student_quantile(level, 3)
