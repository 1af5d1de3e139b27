"""Laws of the exponent of U: exact without noise, right on average and covering with it, refused without a signal."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from bbvi_conv.monitor import Series, exponent


@pytest.mark.parametrize("planted_exponent", [-2.0, -1.0, -0.5, 0.0, 0.7])
def test_a_noiseless_power_law_is_recovered(planted: Callable[..., Series], planted_exponent: float) -> None:
    series = planted(lambda n: 3.0 * n**planted_exponent, 20_000, 0, spread=0.0, noise=0.0)
    estimate = exponent(series)
    assert estimate.value == pytest.approx(planted_exponent, abs=1e-6)
    assert estimate.high - estimate.low < 1e-5


@pytest.mark.parametrize("planted_exponent", [-1.0, -0.5, 0.0])
@pytest.mark.parametrize(("spread", "noise"), [(0.2, 1.0), (0.7, 0.3)])
def test_exponent_is_right_on_average_and_covers(
    planted: Callable[..., Series], planted_exponent: float, spread: float, noise: float
) -> None:
    runs = 200
    series = [planted(lambda n: n**planted_exponent, 20_000, seed, spread=spread, noise=noise) for seed in range(runs)]
    assert noise < 1 or any((run.values[-60:] < 0).any() for run in series)  # negative U are part of the game
    estimates = [exponent(run) for run in series]
    values = np.array([estimate.value for estimate in estimates])
    error = values.std(ddof=1) / math.sqrt(runs)
    assert error < 0.02
    assert abs(values.mean() - planted_exponent) < 4 * error + 0.01  # the estimate is consistent, not unbiased
    inside = np.mean([estimate.low <= planted_exponent <= estimate.high for estimate in estimates])
    assert inside > 0.95 - 4 * math.sqrt(0.95 * 0.05 / runs)


def test_pure_noise_has_no_exponent(planted: Callable[..., Series]) -> None:
    rng, refused = np.random.default_rng(0), 0
    for seed in range(100):
        series = planted(lambda n: 0.0 * n + 1.0, 20_000, seed, spread=0.0, noise=1.0)
        estimate = exponent(series._replace(values=rng.standard_normal(len(series.values))))
        if estimate.value is None:
            refused += 1
            assert "not distinguishable from 0" in estimate.reason or "no power law" in estimate.reason
    assert refused >= 97.5 - 4 * math.sqrt(100 * 0.025 * 0.975)


def test_a_short_run_says_how_long_it_must_be(planted: Callable[..., Series]) -> None:
    estimate = exponent(planted(lambda n: n**-0.5, 25, 0, spread=0.0, noise=0.1))
    assert estimate.value is None
    assert estimate.reason == "needs looks over 1.5 decades of steps: run at least 32 steps"
    few = exponent(Series(*(np.ones(4) for _ in range(5)))._replace(lengths=np.array([1.0, 9.0, 90.0, 900.0])))
    assert few.value is None
    assert "needs 8 looks" in few.reason
    empty = exponent(Series(*(np.empty(0) for _ in range(5))))
    assert empty.value is None
    assert "no look" in empty.reason


def test_an_exactly_zero_gradient_is_said(planted: Callable[..., Series]) -> None:
    series = planted(lambda n: n**-0.5, 20_000, 0, spread=0.0, noise=0.0)
    estimate = exponent(series._replace(values=np.zeros(len(series.values))))
    assert estimate.value is None
    assert "exactly zero" in estimate.reason
