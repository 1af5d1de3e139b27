"""Control variates: features of mean zero, coefficients that take noise off and never bias."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bbvi_conv.monitor.control import MOST_FEATURES, Control, features, fit_control, pilot_draws
from bbvi_conv.program.noise import Noise, NoiseLayout


def draw(count: int, normal: int, uniform: int, seed: int, draws: int = 1) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return NoiseLayout(normal, uniform).draw(generator, count, draws, dtype=torch.float64)


def gradient(noise: Noise) -> Tensor:
    """(1, -2) + 5 eps_0 + 3 (eps_0 eps_1) + 2 (u - 1/2) + a little that no feature explains."""
    eps, u = noise.normal[:, 0], noise.uniform[:, 0]
    shared = 5 * eps[:, 0] + 3 * eps[:, 0] * eps[:, 1] + 2 * (u[:, 0] - 0.5) + 0.1 * (eps[:, 1] ** 3 - 3 * eps[:, 1])
    return torch.stack([1 + shared, -2 - shared], 1)


def test_features_have_mean_zero() -> None:
    found = features(draw(40_000, 3, 2, seed=0))
    assert found is not None
    assert found.shape == (40_000, 3 + 2 + 6)
    stderr = found.std(0) / math.sqrt(len(found))
    assert bool((found.mean(0).abs() < 4.5 * stderr).all())
    assert bool((found.std(0) > 0.2).all())


@pytest.mark.parametrize(
    ("normal", "expected"), [(0, None), (21, 21 * 24 // 2), (22, 22), (MOST_FEATURES, MOST_FEATURES), (300, None)]
)
def test_quadratic_features_and_then_all_are_left_out_as_there_are_more(normal: int, expected: int | None) -> None:
    found = features(draw(2, normal, 0, seed=0))
    assert (None if found is None else found.shape[1]) == expected
    draws = pilot_draws(draw(1, normal, 0, seed=0))
    assert draws == 0 if expected is None else draws >= 8 * expected


def test_the_mean_stays_and_the_noise_goes() -> None:
    pilot, fresh = draw(512, 3, 1, seed=1), draw(20_000, 3, 1, seed=2)
    control = fit_control(gradient(pilot), pilot)
    assert control is not None
    raw = gradient(fresh)
    quiet = control.quiet(raw, fresh)
    stderr = quiet.std(0) / math.sqrt(len(quiet))
    assert bool(((quiet.mean(0) - torch.tensor([1.0, -2.0])).abs() < 4 * stderr).all())
    assert bool((quiet.var(0) < 0.005 * raw.var(0)).all())


def test_any_coefficients_leave_the_mean_alone() -> None:
    fresh = draw(40_000, 2, 0, seed=3)
    wrong = Control(torch.full((5, 1), 7.0, dtype=torch.float64))
    raw = torch.full((40_000, 1), 0.5, dtype=torch.float64)
    quiet = wrong.quiet(raw, fresh)
    assert abs(float(quiet.mean()) - 0.5) < 4 * float(quiet.std()) / math.sqrt(len(quiet))


def test_noise_that_no_feature_explains_gets_no_control() -> None:
    pilot = draw(256, 4, 0, seed=4)
    unrelated = torch.randn(256, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert fit_control(unrelated, pilot) is None
    assert fit_control(unrelated[:20], pilot.at(slice(0, 20))) is None  # too few draws to fit


def test_a_gradient_without_noise_gets_no_control() -> None:
    pilot = draw(128, 2, 0, seed=6)
    assert fit_control(torch.ones(128, 3, dtype=torch.float64), pilot) is None
