"""The arithmetic of the convergence study: what it reads off curves that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bbvi_conv as bc
from bbvi_conv.model_file import load_module

study = load_module(str(Path(__file__).parents[2] / "examples" / "vae_convergence.py"))


def curve(pace: float, ends: tuple[float, float]) -> dict[str, Any]:
    """Two seeds, marks at steps 10 and 20, ``pace`` seconds a step; the second seed is 2 higher throughout."""
    points = [
        {"step": step, "seconds": pace * step, "negative_elbo": [end, end + 2.0]}
        for step, end in zip((10, 20), ends, strict=True)
    ]
    return {"group": "tighter bounds", "curve": points}


def test_bounds_are_compared_at_equal_steps_and_at_equal_seconds() -> None:
    """A row twice as slow is better at equal steps and worse at equal seconds, by numbers read off the lines."""
    found = {"IWAE 4": curve(1.0, (100.0, 90.0)), "growing K": curve(2.0, (98.0, 80.0))}
    compared = study.tighter(found)
    assert compared["seconds"] == 20
    assert compared["equal_steps"]["growing K"]["value"] == pytest.approx(81)
    assert compared["equal_seconds"]["growing K"]["value"] == pytest.approx(99)  # its first mark, at 20 seconds
    assert compared["equal_seconds"]["IWAE 4"]["value"] == pytest.approx(91)
    assert compared["better_than"]["row"] == "IWAE 4"
    assert compared["better_than"]["equal_steps"]["growing K"] == pytest.approx({"value": 10, "low": 10, "high": 10})
    assert compared["better_than"]["equal_seconds"]["growing K"]["value"] == pytest.approx(-8)


def test_between_marks_the_curve_is_a_line() -> None:
    row = curve(1.0, (100.0, 90.0))
    torch.testing.assert_close(study.at_seconds(row, 15.0), torch.tensor([95.0, 97.0], dtype=torch.float64))
    torch.testing.assert_close(study.at_seconds(row, 5.0), torch.tensor([100.0, 102.0], dtype=torch.float64))
    torch.testing.assert_close(study.at_seconds(row, 50.0), torch.tensor([90.0, 92.0], dtype=torch.float64))


def test_the_bar_is_on_the_upper_end_of_the_slope() -> None:
    plateau = {"trend": "decaying", "reason": "because"}
    for high, met in ((0.04, True), (0.06, False), (None, None)):
        slope = {"value": None if high is None else 0.0, "low": -0.1, "high": high}
        row = {"looks": {"rate": {"envelope_slope": slope}, "plateau": plateau}}
        assert study.verdict(row)["met"] is met


def test_the_rows_are_what_the_study_is_about() -> None:
    rows = study.rows(study.SIZES["default"])
    assert {row.group for row in rows.values()} == {
        "dense, optimisers", "dense, tighter bounds",
        "optimisers", "beta-VAE", "depth", "smoothness", "beta1", "tighter bounds", "B and K",
    }  # fmt: skip
    assert rows["dense, growing K"].objective.stop == rows["dense, IWAE 20"].objective.num_particles == 20
    assert rows["growing K"].objective.stop == rows["IWAE 5"].objective.num_particles == 5
    assert {row.dense is None for row in rows.values() if not row.group.startswith("dense")} == {True}
    assert isinstance(rows["adam"].optimiser.step_size, bc.InverseSqrt)
    assert isinstance(rows["adam, constant 0.05"].optimiser.step_size, bc.Constant)
    assert set(study.FIRST) <= {*rows, *(row.group for row in rows.values())}
    with pytest.raises(TypeError):
        study.Row("depth")
