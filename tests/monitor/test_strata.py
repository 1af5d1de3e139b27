"""Laws of the strata: they tile the run, the look is uniform, and the mean over looks is the mean over all steps."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from bbvi_conv.monitor import Series, Strata, running_mean, running_means
from bbvi_conv.monitor.strata import collapsed_variance


@pytest.mark.parametrize("strata", [Strata(), Strata(1, 0.5), Strata(7, 0.0), Strata(100, 2.0)])
def test_strata_tile_the_steps_and_grow(strata: Strata) -> None:
    bounds = [strata.bounds(index) for index in range(20)]
    assert bounds[0] == (0, 1)
    for (_, stop), (start, end) in pairwise(bounds):
        assert start == stop
        assert end - start == max(math.floor(strata.growth * start), min(1 + start // 2, strata.min_length))


def test_the_look_is_uniform_on_its_stratum_and_replays() -> None:
    strata = Strata(10, 0.0)
    assert strata.bounds(10) == (56, 66)
    steps = np.array([strata.random_step(seed, 10) for seed in range(5000)])
    counts = np.bincount(steps - 56, minlength=10)
    assert len(counts) == 10
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # chi square with 9 degrees of freedom, 99.9%
    assert steps.tolist() == [strata.random_step(seed, 10) for seed in range(5000)]
    assert len({(strata.random_step(0, index) - 6) % 10 for index in range(5, 65)}) == 10


def run(strata: Strata, count: int, seed: int, noise: float) -> Series:
    """U with a known standard error ``noise``, on the trajectory below."""
    bounds = [strata.bounds(index) for index in range(count)]
    steps = np.array([strata.random_step(seed, index) for index in range(count)], dtype=float)
    lengths = np.array([float(stop - start) for start, stop in bounds])
    values = trajectory(steps) + noise * np.random.default_rng(seed).standard_normal(count)
    return Series(steps, lengths, values, np.zeros(count), np.full(count, noise**2))


def trajectory(steps: np.ndarray) -> np.ndarray:
    """Flat with a steep beginning and a ripple."""
    return 1.0 + 30.0 * np.exp(-steps / 20.0) + 0.5 * np.sin(steps / 13.0)


def test_mean_of_looks_is_the_mean_over_all_steps() -> None:
    strata, count = Strata(50, 0.1), 40
    stop = strata.bounds(count - 1)[1]
    truth = float(trajectory(np.arange(stop)).mean())
    means = np.array([running_mean(run(strata, count, seed, noise=0.3)).value for seed in range(300)])
    error = means.std(ddof=1) / math.sqrt(len(means))
    assert abs(means.mean() - truth) < 4 * error
    one = run(strata, count, 0, noise=0.3)
    assert abs(one.values.mean() - truth) > 20 * error  # power: forgetting the lengths is visible
    assert running_mean(one).value == pytest.approx(running_means(one.lengths, one.values)[-1], rel=1e-12)


@pytest.mark.parametrize("count", [40, 41])
def test_interval_of_the_running_mean_covers(count: int) -> None:
    strata = Strata(50, 0.1)
    truth = float(trajectory(np.arange(strata.bounds(count - 1)[1])).mean())
    inside = [(e := running_mean(run(strata, count, seed, 0.3))).low <= truth <= e.high for seed in range(400)]
    assert np.mean(inside) > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 400)


def looks(values: np.ndarray, length: float, noise: float) -> Series:
    count = len(values)
    lengths = np.full(count, length)
    return Series(np.cumsum(lengths) - 1.0, lengths, values, np.zeros(count), np.full(count, noise**2))


def test_interval_narrows_as_the_run_grows_and_stays_above_zero() -> None:
    values = 1.0 + np.random.default_rng(0).standard_normal(400)
    short, long = running_mean(looks(values[:40], 10.0, 1.0)), running_mean(looks(values, 10.0, 1.0))
    assert long.high - long.low < 0.6 * (short.high - short.low)
    negative = running_mean(looks(-1e-3 + 0.1 * np.random.default_rng(1).standard_normal(400), 10.0, 0.1))
    assert negative.low == 0.0
    assert negative.high > 0.0


def test_steps_looked_at_one_by_one_have_no_error_but_their_noise() -> None:
    steep = np.geomspace(1e6, 1.0, 20)
    exact, noisy = running_mean(looks(steep, 1.0, 0.0)), running_mean(looks(steep, 1.0, 3.0))
    assert exact.low == exact.value == exact.high
    assert noisy.high - noisy.low == pytest.approx(2 * 1.95996 * 3.0 / math.sqrt(20), rel=1e-4)
    assert running_mean(looks(steep, 2.0, 3.0)).high > 1.5 * noisy.high  # where a step was chosen, the fall counts


@pytest.mark.parametrize("count", [2, 3, 8, 9])
def test_collapsed_variance_is_unbiased_for_equal_strata(count: int) -> None:
    rng, coefficients = np.random.default_rng(2), np.linspace(1.0, 2.0, count)
    sample = np.array([collapsed_variance(5.0 + rng.standard_normal(count), coefficients)[0] for _ in range(4000)])
    assert abs(sample.mean() - (coefficients**2).sum()) < 4 * sample.std(ddof=1) / math.sqrt(4000)


def test_degrees_of_freedom_count_the_groups_that_matter() -> None:
    pairs = np.tile([0.0, 1.0], 10)
    assert collapsed_variance(pairs, np.ones(20))[1] == pytest.approx(3 * 10 - 2)  # ten pairs of exactly equal spread
    pairs[1] = 1e4
    assert collapsed_variance(pairs, np.ones(20))[1] == pytest.approx(1.0, abs=1e-6)
    rng = np.random.default_rng(3)
    freedom = [collapsed_variance(rng.standard_normal(20), np.ones(20))[1] for _ in range(2000)]
    assert 8 < np.mean(freedom) < 14


def test_too_few_looks_and_bad_arguments_are_named() -> None:
    one = running_mean(looks(np.ones(3), 5.0, 0.1))
    assert one.value is None
    assert "at least 4 strata" in one.reason
    with pytest.raises(ValueError, match="min_length must be at least 1"):
        Strata(0)
    with pytest.raises(ValueError, match="growth must be a finite number"):
        Strata(1, -0.1)
    with pytest.raises(ValueError, match="index of a stratum"):
        Strata().bounds(-1)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        Strata().random_step(-1, 0)
