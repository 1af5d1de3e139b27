"""Figures over seeds: intervals that hold over runs, and seeds that agree or do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bbvi_conv.monitor import MonitorState, Strata, look, series, summary, update
from bbvi_conv.monitor.seeds import FAR, agreement, expected_norm, highest, mean_series, over_seeds
from bbvi_conv.monitor.series import Series
from bbvi_conv.monitor.strata import running_mean

STRATA = Strata(20, 0.2)


def run(generator: np.random.Generator, level: float, count: int = 20) -> Series:
    """One run whose squared norm is level / (1 + n/50) with noise, looked at on common steps."""
    bounds = np.array([STRATA.bounds(k) for k in range(count)], dtype=float)
    steps = np.array([STRATA.random_step(0, k) for k in range(count)], dtype=float)
    noise = 0.05 * generator.standard_normal(count)
    return Series(steps, bounds[:, 1] - bounds[:, 0], level / (1 + steps / 50) + noise, 0 * steps, 0 * steps + 0.05**2)


def test_the_interval_holds_over_runs_where_that_of_one_run_does_not() -> None:
    generator, seeds, repeats = np.random.default_rng(0), 6, 400
    stops = STRATA.bounds(19)[1]
    truth = float(np.mean(1.0 / (1 + np.arange(stops) / 50)))  # levels have mean 1
    held, held_by_one = 0, 0
    for _ in range(repeats):
        runs = [run(generator, level) for level in generator.gamma(4.0, 0.25, seeds)]
        mean = Series(*(np.mean(column, axis=0) for column in zip(*runs, strict=True)))
        found, one = expected_norm(runs, mean), running_mean(mean)
        held += found.low <= truth <= found.high
        held_by_one += one.low <= truth <= one.high
    assert held / repeats > 0.95 - 4 * math.sqrt(0.95 * 0.05 / repeats)
    assert held_by_one < held - 4 * math.sqrt(repeats) / 2  # power: the spread between runs is what matters


def state(norms: list[float]) -> MonitorState:
    made = MonitorState()
    for k, norm in enumerate(norms):
        spread = 0.1 * torch.randn(8, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        gradients = spread - spread.mean(0) + math.sqrt(norm / 3)
        grams = {"phi": gradients @ gradients.T}
        made = update(made, look(STRATA.random_step(0, k), k, STRATA.bounds(k), grams))
    return made


def test_over_seeds_averages_what_each_seed_says() -> None:
    one, other = state([4.0, 3.0, 2.0, 1.0, 0.5, 0.25]), state([8.0, 5.0, 4.0, 1.0, 1.5, 0.75])
    both = over_seeds([one, other], steps=30)
    assert both.label == "over 2 seeds"
    each = [summary(run, steps=30).gradient_norm_sq["total"].value for run in (one, other)]
    assert both.gradient_norm_sq["total"].value == pytest.approx(sum(each) / 2)
    assert both.gradient_norm_sq["phi"] == both.gradient_norm_sq["total"]
    assert "no theta" in both.gradient_norm_sq["theta"].reason
    mean = mean_series([one, other], steps=30)
    single = series(one, steps=30)
    assert mean is not None
    assert single is not None
    np.testing.assert_allclose(mean.floors, single.floors / 2)  # the noise of a mean of two
    assert over_seeds([one], steps=30) == summary(one, steps=30)


def test_a_seed_that_ended_early_shortens_the_common_run() -> None:
    one, other = state([4.0, 3.0, 2.0, 1.0, 0.5, 0.25]), state([8.0, 5.0, 4.0, 1.0])
    both = over_seeds([one, other], steps=STRATA.bounds(3)[1])
    assert both.looks == 4
    assert both.steps == STRATA.bounds(3)[1]


def losses(*means: float, count: int = 400) -> torch.Tensor:
    """Losses on common noise: the differences are far quieter than the losses."""
    generator = torch.Generator().manual_seed(0)
    shared = 5.0 * torch.randn(count, generator=generator, dtype=torch.float64)
    own = 0.1 * torch.randn(len(means), count, generator=generator, dtype=torch.float64)
    return torch.tensor(means, dtype=torch.float64)[:, None] + shared + own


def moments(*means: float) -> tuple[np.ndarray, np.ndarray, int]:
    return np.array(means)[:, None] * np.array([1.0, 0.0]), np.ones((len(means), 2)), 1000


def test_the_best_is_the_highest_bound_that_did_not_freeze() -> None:
    assert highest(losses(3.0, 1.0, 2.0), [False, False, False]) == 1
    assert highest(losses(3.0, 1.0, 2.0), [False, True, False]) == 2
    assert highest(losses(3.0, 1.0, 2.0), [True, True, True]) == 1
    assert highest(losses(3.0, math.nan, 2.0), [False, False, False]) == 2


def test_seeds_disagree_by_bound_or_by_place() -> None:
    seeds = (7, 8, 9)
    same = agreement(losses(1.0, 1.0, 1.0), seeds, 8, moments(0.0, 0.0, 0.2), 0.1)
    assert same.disagree == ()
    assert same.shortfall.keys() == same.distance.keys() == {7, 9}
    lower = agreement(losses(1.0, 1.0, 2.0), seeds, 8, moments(0.0, 0.0, 0.0), 0.1)
    assert lower.disagree == (9,)
    assert lower.shortfall[9].low < 1.0 < lower.shortfall[9].high
    within = agreement(losses(1.0, 1.0, 1.08), seeds, 8, moments(0.0, 0.0, 0.0), 0.1)
    assert within.shortfall[9].low > 0.0  # a difference that is seen, but smaller than the tolerance
    assert within.disagree == ()
    away = agreement(losses(1.0, 1.0, 1.0), seeds, 8, moments(-3.0, 0.0, FAR), 0.1)
    assert away.disagree == (7,)  # two standard deviations exactly are not significantly more
    assert away.distance[7].low < 3.0 < away.distance[7].high
    unknown = agreement(losses(1.0, 1.0, 2.0), seeds, 8, "no latent is global", 0.1)
    assert unknown.disagree == (9,)
    assert unknown.distance[7].reason == "no latent is global"
