"""The hand-written gradients against automatic differentiation of the bounds as written, and the program end to end."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bbvi_conv.engine import Calculus
from bbvi_conv.model_file import load_module
from bbvi_conv.objectives import IWAE, MIWAE, PIWAE, VRIWAE, Objective
from bbvi_conv.program.build import build
from bbvi_conv.program.noise import Noise

ROOT = Path(__file__).parents[2]
SIZE, DIM, VARIANCE = 5, 3, 2 / 3


gradients = load_module(str(ROOT / "examples" / "rainforth2018" / "gradients.py"))
gaussian = load_module("tighter_bounds")


def normal_log_density(value: Tensor, mean: Tensor, variance: float) -> Tensor:
    return -(value - mean).square().sum(-1) / (2 * variance) - DIM / 2 * math.log(2 * math.pi * variance)


class Point:
    """Parameters far from the optimum, data and noise ``(N, M K, D)``, all float64."""

    def __init__(self, groups: int, particles: int, offset: float = 0.7) -> None:
        (self.x,) = gaussian.data(size=SIZE, dim=DIM, seed=3)
        self.parameters = [p.requires_grad_() for p in gaussian.near_optimum(self.x, offset=offset)]
        source = torch.Generator().manual_seed(groups * 100 + particles)
        self.noise = torch.randn(SIZE, groups * particles, DIM, generator=source, dtype=torch.float64)
        self.groups, self.particles = groups, particles

    def log_w(self, *, density_sees_phi: bool = True, path: bool = True) -> Tensor:
        """log w as the model's definition has it, ``(N, M, K)``."""
        mu, slope, offset = self.parameters
        mean = self.x @ slope.T + offset
        z = mean[:, None] + math.sqrt(VARIANCE) * self.noise
        z = z if path else z.detach()
        density_mean = (mean if density_sees_phi else mean.detach())[:, None]
        found = normal_log_density(z, mu, 1.0) + normal_log_density(self.x[:, None], z, 1.0)
        found = found - normal_log_density(z, density_mean, VARIANCE)
        return found.unflatten(-1, (self.groups, self.particles))

    def renyi_bound(self, alpha: float) -> Tensor:
        """Mean over data and M of 1 / (1 - alpha) log mean_k w^(1 - alpha)."""
        inner = ((1 - alpha) * self.log_w()).logsumexp(-1) - math.log(self.particles)
        return (inner / (1 - alpha)).mean()

    def doubly(self, alpha: float) -> Tensor:
        """Scalar whose gradient for phi is sum_k (alpha v + (1 - alpha) v^2) dlogw/dz dz/dphi."""
        log_w = self.log_w(density_sees_phi=False)
        v = ((1 - alpha) * log_w).softmax(-1).detach()
        return ((alpha * v + (1 - alpha) * v.square()) * log_w).sum(-1).mean()

    def gradient(self, scalar: Tensor) -> tuple[Tensor, Tensor]:
        """theta ``(D,)``, and phi with b in the first column and A after it ``(D, 1 + D)``."""
        mu, slope, offset = torch.autograd.grad(scalar, self.parameters)
        return mu, torch.cat([offset[:, None], slope], 1)

    def by_hand(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All estimators: every group of K draws is a datum of its own, and M is an average over groups."""
        with torch.no_grad():
            mu, slope, offset = self.parameters
            gap = self.x @ slope.T + offset - (self.x + mu) / 2
            ahead = self.x @ slope.T + offset - mu
            design = torch.cat([torch.ones_like(self.x[:, :1]), self.x], 1)
            noise = self.noise.unflatten(1, (self.groups, self.particles)).flatten(0, 1)
            gap, ahead, design = (each.repeat_interleave(self.groups, 0) for each in (gap, ahead, design))
            return estimates(noise, gap, ahead, design, (self.particles,), place=0)


def estimates(
    noise: Tensor, gap: Tensor, ahead: Tensor, design: Tensor, ends: tuple[int, ...], place: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """theta and phi of all estimators over the first ``ends[place]`` draws, by the route that the program takes."""
    scale, size = math.sqrt(VARIANCE), len(noise)
    log_w = gradients.log_weights(noise, noise.square().sum(-1), gap, scale)
    mean = gradients.contract(gradients.vectors(noise, log_w, gap, ends), design)[:, place] / size
    phi, theta = gradients.phi_estimators(scale), gradients.theta_estimators(scale)
    phi_values = gradients.combine(phi, mean, gap.T @ design / size)
    theta_values = gradients.combine(theta, mean[..., 0], ahead.mean(0))
    return (
        {e.name: value for e, value in zip(theta, theta_values, strict=True)},
        {e.name: value for e, value in zip(phi, phi_values, strict=True)},
    )


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0.01  # power: the tolerance is a billionth of what is compared
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("particles", [1, 2, 7])
@pytest.mark.parametrize(("name", "alpha"), [("iwae", 0.0), ("vr02", 0.2), ("vr05", 0.5)])
def test_every_estimator_is_the_gradient_of_its_bound(groups: int, particles: int, name: str, alpha: float) -> None:
    point = Point(groups, particles)
    theta, phi = point.by_hand()
    expected_theta, expected_phi = point.gradient(point.renyi_bound(alpha))
    assert_equal(theta[name], expected_theta)
    assert_equal(phi[name], expected_phi)
    doubly = "dreg" if alpha == 0 else f"{name}_dreg"
    assert_equal(phi[doubly], point.gradient(point.doubly(alpha))[1])


@pytest.mark.parametrize("groups", [1, 3])
def test_vae_rows_average_single_draws(groups: int) -> None:
    """Seen as one stretch of M draws, the row ``vae`` is the ELBO with M draws, for theta and phi."""
    point = Point(groups, 1)
    expected_theta, expected_phi = point.gradient(point.renyi_bound(0.0))
    with torch.no_grad():
        mu, slope, offset = point.parameters
        mean = point.x @ slope.T + offset
        design = torch.cat([torch.ones_like(point.x[:, :1]), point.x], 1)
        theta, phi = estimates(point.noise, mean - (point.x + mu) / 2, mean - mu, design, (groups,), place=0)
    assert_equal(theta["vae"], expected_theta)
    assert_equal(phi["vae"], expected_phi)


@pytest.mark.parametrize("groups", [1, 3])
def test_piwae_averages_groups(groups: int) -> None:
    """phi of PIWAE is that of MIWAE(M, 8); the draws after the last whole group count for nothing."""
    point = Point(groups, gradients.GROUP)
    expected = point.gradient(point.renyi_bound(0.0))[1]
    with torch.no_grad():
        mu, slope, offset = point.parameters
        mean = point.x @ slope.T + offset
        design = torch.cat([torch.ones_like(point.x[:, :1]), point.x], 1)
        longer = torch.cat([point.noise, torch.ones_like(point.noise[:, :3])], 1)
        ends = (5, groups * gradients.GROUP, groups * gradients.GROUP + 3)
        _, phi = estimates(longer, mean - (point.x + mu) / 2, mean - mu, design, ends, place=1)
    assert_equal(phi["piwae"], expected)


def test_prefixes_are_what_each_number_of_draws_gives_alone() -> None:
    """Stretches with very different weights: log weights span hundreds of nats, in single precision too."""
    point = Point(1, 40, offset=8.0)
    with torch.no_grad():
        mu, slope, offset = point.parameters
        mean = point.x @ slope.T + offset
        gap, ahead = mean - (point.x + mu) / 2, mean - mu
        design = torch.cat([torch.ones_like(point.x[:, :1]), point.x], 1)
        log_w = gradients.log_weights(point.noise, point.noise.square().sum(-1), gap, math.sqrt(VARIANCE))
        assert (log_w.amax(-1) - log_w.amin(-1)).max() > 100
        ends = (1, 2, 7, 16, 40)
        for place, end in enumerate(ends):
            together = estimates(point.noise, gap, ahead, design, ends, place)
            alone = estimates(point.noise[:, :end], gap, ahead, design, (end,), 0)
            single = estimates(*(each.float() for each in (point.noise, gap, ahead, design)), ends, place)
            for part in (0, 1):
                for name, value in alone[part].items():
                    torch.testing.assert_close(together[part][name], value, rtol=1e-10, atol=1e-10)
                    torch.testing.assert_close(single[part][name].double(), value, rtol=1e-4, atol=1e-4)


DOUBLY = "doubly-reparameterised"
LIBRARY: dict[str, tuple[Objective, str, str | None]] = {
    "IWAE": (IWAE(7), "iwae", "iwae"),
    "IWAE, doubly": (IWAE(7, DOUBLY), "dreg", "iwae"),
    "VR-IWAE 0.2": (VRIWAE(7, 0.2), "vr02", "vr02"),
    "VR-IWAE 0.2, doubly": (VRIWAE(7, 0.2, DOUBLY), "vr02_dreg", "vr02"),
    "VR-IWAE 0.5": (VRIWAE(7, 0.5), "vr05", "vr05"),
    "VR-IWAE 0.5, doubly": (VRIWAE(7, 0.5, DOUBLY), "vr05_dreg", "vr05"),
    "MIWAE": (MIWAE(24, 1), "vae", "vae"),
    "PIWAE": (PIWAE(3, gradients.GROUP), "piwae", "iwae"),
}
"""The library's objective, and the names of the same gradients for phi and for theta here."""


@pytest.mark.parametrize("name", LIBRARY)
def test_library_gives_the_same_gradients_on_the_same_noise(name: str) -> None:
    objective, for_phi, for_theta = LIBRARY[name]
    point = Point(1, objective.draws)
    program = build(gaussian.model, gaussian.guide, (point.x,), dtype=torch.float64)
    values = dict(zip(("mu", "A", "b"), point.parameters, strict=True))
    flat = torch.cat([values[leaf.name].detach().flatten() for leaf in program.leaves]).requires_grad_()
    noise = Noise(point.noise.transpose(0, 1).flatten(1), torch.empty(objective.draws, 0, dtype=torch.float64))
    calculus = Calculus(program, objective, program.log_weights, normaliser=SIZE)
    loss = calculus.loss(flat, noise, program.batch(None), torch.tensor(1.0))
    theta, phi = program.split(-torch.autograd.grad(loss, flat)[0])
    with torch.no_grad():
        mu, slope, offset = point.parameters
        mean = point.x @ slope.T + offset
        design = torch.cat([torch.ones_like(point.x[:, :1]), point.x], 1)
        by_hand = estimates(point.noise, mean - (point.x + mu) / 2, mean - mu, design, (objective.draws,), place=0)
    assert_equal(by_hand[0][for_theta], theta["mu"])
    assert_equal(by_hand[1][for_phi], torch.cat([phi["b"][:, None], phi["A"]], 1))


SLOPES = {"theta_M", "phi_M", "theta_B", "phi_B", "theta_K"} | {"phi_K_iwae", "phi_K_dreg", "phi_K_vr05", "phi_K_vr02"}


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = ROOT / "examples" / "tighter_bounds.py"
    return subprocess.run(
        [sys.executable, "-W", "error", str(program), *arguments, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_quick_run_end_to_end(tmp_path: Path) -> None:
    """All figures, the issue's keys, and what theory says wherever a quick run has the power to see it."""
    finished = run(tmp_path, "all", "--quick")
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {f"fig{i}" for i in range(1, 12)} | {"rmse", "eq9", "batch"}
    assert {"slopes", "rmse", "figure7", "eq9", "snr", "dsnr"} <= results.keys()
    slopes = results["slopes"]
    assert slopes.keys() >= SLOPES
    for slope in slopes.values():
        assert {"value", "low", "high", "window"} <= slope.keys()
    expected = {"theta_M": 0.5, "phi_M": 0.5, "theta_B": 0.5, "phi_B": 0.5}  # exact laws: averages of i.i.d. terms
    for key, target in expected.items():
        half = (slopes[key]["high"] - slopes[key]["low"]) / 2
        assert half < 0.2  # power: a slope of 0 or 1 would be several half widths away
        assert abs(slopes[key]["value"] - target) < 2 * half
    assert slopes["phi_K_iwae"]["high"] < 0 < slopes["phi_K_dreg"]["low"]
    assert slopes["theta_K"]["low"] > 0
    last = results["eq9"]["cosine"][-1]
    assert last["high"] - last["low"] < 0.1
    assert last["low"] - 0.05 < 1 < last["high"] + 0.05


def test_one_figure_and_a_bad_choice(tmp_path: Path) -> None:
    assert run(tmp_path, "fig1", "--quick").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"fig1.png", "results.json"}
    refused = run(tmp_path, "fig1", "--quick", "--paper")
    assert refused.returncode == 2
    assert "either --paper or --quick" in refused.stderr
