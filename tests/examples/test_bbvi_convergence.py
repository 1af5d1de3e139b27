"""The exact objective against closed forms and Monte Carlo, slopes on known curves, the program as a whole."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import bbvi_conv as bc
from bbvi_conv.binding import bind
from bbvi_conv.families import Linear
from bbvi_conv.model_file import load_module

ROOT = Path(__file__).parents[2]
KEYS = {
    "reference", "target", "log_concave", "family", "parameterisation", "estimator", "optimiser", "guaranteed",
    "expected_slope", "slope", "gap_nats", "khat", "seconds",
}  # fmt: skip


program = load_module(str(ROOT / "examples" / "bbvi_convergence.py"))


@pytest.fixture(scope="module")
def theory() -> ModuleType:
    """The modules that the program imports from beside it."""
    return sys.modules["bbvi_theory"]


def test_the_exact_objective_is_the_evidence_at_the_posterior_of_linear_regression(theory: ModuleType) -> None:
    target = theory.targets.LINEAR
    best, lowest = target.regression.optimum(True)
    mean, covariance = target.module.posterior(*target.args)
    torch.testing.assert_close(best.loc, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(best.factor @ best.factor.T, covariance, rtol=1e-10, atol=1e-10)
    assert lowest == pytest.approx(-float(target.module.log_evidence(*target.args)), rel=1e-12)


@pytest.mark.parametrize("name", ["LINEAR", "LOGISTIC"])
@pytest.mark.parametrize("family", [bc.MeanField(0.4, Linear()), bc.FullRank(0.4, Linear())], ids=["mean", "full"])
def test_the_exact_objective_is_the_librarys_in_expectation(theory: ModuleType, name: str, family: object) -> None:
    target = getattr(theory.targets, name)
    program = bc.build(target.module.model, args=target.args, family=family)
    x = program.initial() + torch.linspace(-0.2, 0.3, len(program.initial()), dtype=torch.float64)
    q = theory.targets.Gaussian.of(program, x)
    noise = program.layout.draw(torch.Generator().manual_seed(0), 1500, dtype=torch.float64)
    _, batch = program.example()
    values = [program.site_values(x, noise.at(i), batch) for i in range(1500)]
    losses = torch.stack([value.log_q - value.log_p for value in values])
    error = float(losses.std()) / len(losses) ** 0.5
    exact = float(target.regression.loss(q.loc, q.factor))
    assert abs(float(losses.mean()) - exact) < 4 * error
    assert error < 0.02 * abs(exact)


def test_slopes_are_those_of_known_curves(theory: ModuleType) -> None:
    fitted = theory.measure._fitted
    steps = np.arange(1, 3001, 7)
    assert fitted((steps, 5 * steps**-0.5), geometric=False).value == pytest.approx(-0.5)
    late = np.where(steps < 80, 1.0, 1e-3 * (steps / 3000.0) ** -1.0)
    assert fitted((steps, late), geometric=False).value == pytest.approx(-1.0)
    fall = np.maximum(np.exp(-0.05 * steps), 1e-16)
    assert fitted((steps, fall), geometric=True).value == pytest.approx(-0.05)
    assert fitted((steps, 0 * steps), geometric=False).value is None


def test_every_row_is_a_sound_pair_and_its_key_its_own(theory: ModuleType) -> None:
    rows = theory.rows.table(quick=False)
    assert len({row.key for row in rows}) == len(rows)
    assert {row.target.name for row in rows if not row.target.log_concave} == {
        "funnel",
        "banana",
        "two modes",
        "eight schools",
    }
    assert all(row.quantity == "E||grad||^2" for row in rows if not row.target.log_concave)
    seen = set()
    for row in rows:
        kind = (row.estimator, row.optimiser, row.parameterisation)
        if kind in seen:
            continue
        seen.add(kind)
        program = bc.build(row.target.module.model, args=row.target.args, family=row.settings["family"])
        bind(row.settings["optimiser"], program, row.settings["objective"], 1.0)


def test_where_a_ball_binds_the_gradient_mapping_takes_the_gradients_place(theory: ModuleType) -> None:
    (row,) = (row for row in theory.rows.table(quick=False) if "tight" in row.key)
    fit, (seen,) = theory.measure._run(row, 1, 150)
    rule = bind(fit.settings.optimiser, fit.program, fit.objective, 1.0)
    assert rule.onto.on_boundary(fit.x)
    gradient, mapping = (theory.measure._looked(fit, seen, given).values for given in (None, rule))
    free = [not rule.onto.on_boundary(seen[look.step][0]) for look in fit.state.monitor.looks]
    assert 0 < sum(free) < len(free)
    # inside the ball both estimate the same squared norm; at its edge the mapping leaves out what points outwards
    assert np.abs(mapping[free] / gradient[free] - 1).max() < 0.5
    assert mapping[-3:].mean() < 0.5 * gradient[-3:].mean()


def test_a_row_that_diverged_is_named_and_not_drawn(theory: ModuleType, tmp_path: Path) -> None:
    row = dict.fromkeys(("family", "parameterisation", "estimator", "optimiser"), "x")
    row |= {"quantity": "E||grad||^2", "expected_slope": -0.5, "outcomes": ["diverged"], "curves": [[[0], [1e70]]]}
    figure = theory.figures.falls([row], "all lost")
    figure.savefig(tmp_path / "lost.png")
    (axis,) = figure.axes
    assert [len(line.get_xdata()) for line in axis.get_lines()] == [0]
    assert axis.get_legend().get_texts()[0].get_text() == "x, x, x, x: diverged"


def test_claims_of_log_concavity_agree_with_the_library(theory: ModuleType) -> None:
    for name in ("LINEAR", "LOGISTIC", "FUNNEL", "BANANA", "MODES", "SCHOOLS"):
        target = getattr(theory.targets, name)
        found = bc.assumptions(target.module.model, bc.MeanField(1.0), bc.Adam(), target.args)
        assert found.status("log-concave target") == ("holds" if target.log_concave else "fails")


def test_a_bare_linear_scale_goes_wrong_and_a_kept_one_does_not(theory: ModuleType) -> None:
    assert theory.unprotected._run(3, "SGD")["nonpositive"]
    assert theory.unprotected._run(3, "prox-SGD") == {"nonpositive": False, "jump": False}


def test_the_program_goes_on_where_it_was(tmp_path: Path) -> None:
    out, app = tmp_path / "out", typer.Typer()
    app.command()(program.run)
    options = ["--out", str(out), "--quick", "--only", "prox", "--workers", "1", "--steps", "200"]
    for already in (0, 1):
        done = CliRunner().invoke(app, options, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert f"1 rows, {already} of them already measured" in done.output
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (row,) = results["rows"]
    assert row.keys() >= KEYS
    assert row["slope"].keys() >= {"value", "low", "high"}
    assert row["slope"]["value"] < -0.5
    assert 0 < row["gap_nats"] < 1
    assert math.isfinite(row["khat"])
    assert results["unprotected"]["share"]["SGD"] == 1.0
    assert (out / "linear_regression.png").stat().st_size > 10_000
    assert (out / "unprotected.png").stat().st_size > 5_000
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table.startswith("| reference | target | log-concave |")
    assert "| at most -0.5 | -" in table
