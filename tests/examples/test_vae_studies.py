"""The studies of VAEs on MNIST as a user runs them, at the size that is there for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    "BBVI_CONV_DATA" not in os.environ, reason="BBVI_CONV_DATA names no folder of real data"
)


def study(name: str, out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """results.json and what was printed, from a process of its own."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--out", str(out), "--quick", *options]
    done = subprocess.run([*command, "--engine", "traced"], capture_output=True, text=True, check=True)
    return json.loads((out / "results.json").read_text(encoding="utf-8")), done.stdout


def test_the_table_of_likelihoods_keeps_its_rows_and_adds_to_them(tmp_path: Path) -> None:
    """The mean image alone gives 196 nats for these images; a few steps are below, and k = 5 is not k = 1."""
    first, _ = study("iwae_table", tmp_path, "--only", "k5")
    assert list(first["rows"]) == ["k5"]
    assert 150 < first["rows"]["k5"]["nll"] < 190
    both, said = study("iwae_table", tmp_path, "--only", "k5", "--only", "k1")
    assert both["rows"]["k5"] == first["rows"]["k5"]
    assert "k5:" not in said.split("results")[0]  # kept, not measured again
    gap = both["rows"]["k1"]["nll"] - both["rows"]["k5"]["nll"]
    assert both["differences"]["k1 - k5"]["value"] == pytest.approx(gap, abs=1e-3)  # values are kept to 1e-4
    assert (tmp_path / "nll.png").stat().st_size > 10_000


def test_both_gaps_of_a_linear_vae_come_out_as_in_closed_form(tmp_path: Path) -> None:
    """Within the study's bar of 0.01 nats a datum; an amortization gap that large cannot be met by zero."""
    found, _ = study("inference_gaps", tmp_path)
    rows = found["linear"]["gaps"]
    assert rows["amortization"]["exact"] > 0.1
    assert all(row["error"] <= 0.01 for row in rows.values())
    assert found["linear"]["met"]
    gaps = {name: gap["value"] for name, gap in found["mnist"]["gaps"].items()}
    assert gaps["inference"] == pytest.approx(gaps["approximation"] + gaps["amortization"], abs=1e-6)
    assert found["mnist"]["gaps"]["amortization"]["sign"] == "positive"


def test_estimators_of_one_gradient_have_one_mean(tmp_path: Path) -> None:
    """|difference of means|^2 over its noise has mean 1, less where they share their noise; a gradient twice too large
    would show as 2 and more."""
    found, _ = study("gradient_estimators", tmp_path)
    ratios = found["variances"]["difference_of_means_over_noise"]
    for name in ("closed-form KL", "sticking the landing", "score function"):
        assert all(ratio < 1.5 for ratio in ratios[name]), (name, ratios[name])
    trace = {name: each["trace"][-1] for name, each in found["variances"]["estimators"].items()}
    assert trace["score function"] > 10 * trace["pathwise"]
    smooth = found["variances"]["estimators"]
    for each in smooth.values():  # the expectation's change is common to all, whatever the noise of one estimate
        assert each["mean_smoothness"] == pytest.approx(smooth["pathwise"]["mean_smoothness"], rel=0.15)
    assert smooth["score function"]["smoothness"][-1] > 1.3 * smooth["pathwise"]["smoothness"][-1]
