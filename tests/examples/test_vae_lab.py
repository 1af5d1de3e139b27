"""What the studies of variational autoencoders are made of, and the quickest of them as a whole."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from bbvi_conv.model_file import load_module

ROOT = Path(__file__).parents[2]
needs_data = pytest.mark.skipif(
    "BBVI_CONV_DATA" not in os.environ, reason="BBVI_CONV_DATA names no folder of real data"
)


cells = load_module(str(ROOT / "examples" / "cells.py"))


@pytest.fixture(scope="module")
def lab() -> ModuleType:
    """The studies' modules, whose folder is on the path for as long as they are imported."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import vae_lab.autoencoders
        import vae_lab.posteriors
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return vae_lab


def test_a_cell_is_measured_once_and_again_under_other_settings(tmp_path: Path) -> None:
    made = []

    def measure() -> dict[str, object]:
        made.append(1)
        return {"answer": len(made)}

    first = cells.Cells(tmp_path, {"steps": 1}).get("a", measure)
    assert cells.Cells(tmp_path, {"steps": 1}).get("a", measure) == first
    assert cells.Cells(tmp_path, {"steps": 2}).get("a", measure)["answer"] == 2
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["a.json"]


def test_the_orthogonal_autoencoder_finds_the_principal_subspace(lab: ModuleType) -> None:
    """Gaussian data with variances 9, 4 and then 1/4: the sine of the largest angle is under 0.1."""
    scales = torch.tensor([3.0, 2.0, *[0.5] * 6])
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1)) * scales @ basis.T
    u = lab.autoencoders.orthogonal(x, x.mean(0), 2, 300, 64, 0)
    torch.testing.assert_close(u.T @ u, torch.eye(2), rtol=0, atol=1e-5)
    outside = basis[:, 2:].T @ u
    assert torch.linalg.svdvals(outside).max() < 0.1


def test_the_grid_knows_a_gaussian_posterior_and_one_that_is_not(lab: ModuleType) -> None:
    """A linear decoder: the evidence of the multivariate normal and no KL. A squared one: two modes, so a large KL."""
    linear = nn.Linear(2, 5)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))
        linear.bias.zero_()
    linear.double()
    image = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = lab.posteriors.posterior(linear, image, 0.3)
    w = linear.weight.detach()
    total = w @ w.T + 0.09 * torch.eye(5, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(torch.zeros(5, dtype=torch.float64), total).log_prob(image)
    assert found.log_evidence == pytest.approx(float(exact), abs=1e-4)
    assert abs(found.kl_to_gaussian) < 1e-3

    class Square(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z.square()

    bent = lab.posteriors.posterior(Square(), torch.tensor([2.0, 2.0], dtype=torch.float64), 0.3)
    assert bent.kl_to_gaussian > 0.5
    assert float(bent.density.sum()) == pytest.approx(1, abs=1e-9)


def test_networks_of_a_shipped_model_are_new_each_time_and_follow_the_seed() -> None:
    before = torch.get_rng_state()
    first, same, other = (load_module("vae", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [module.encoder[0].weight for module in (first, same, other)]
    assert weights[0] is not weights[1]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@needs_data
def test_the_linear_study_runs_and_nears_pca(tmp_path: Path) -> None:
    """Not the bars, which take twelve times the steps, but most of the way to them; nothing is measured twice."""
    command = [sys.executable, str(ROOT / "examples" / "linear_vae.py"), "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["max_principal_angle_deg"] < 10  # two random planes of 784 dimensions are 88 degrees apart
    assert results["sigma2_rel_error"] < 0.02
    assert 0 < results["loglik_gap_per_datum"] < 0.3
    errors = results["autoencoders"]["squared_error"]
    assert errors["pca"] <= errors["orthogonal linear autoencoder"] < 1.05 * errors["pca"]
    assert errors["linear VAE, posterior means"] < 1.05 * errors["pca"]
    assert results["two_dimensional"]["kl_to_gaussian_nats"]["least"] > -1e-3
    assert math.isfinite(results["two_dimensional"]["mean_log_evidence"])
    again = subprocess.run(command, check=True, capture_output=True, env=environment, text=True)
    assert "learned:" not in again.stdout
    assert {path.name for path in tmp_path.glob("*.png")} == {"curves.png", "posteriors.png"}
