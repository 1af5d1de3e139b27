"""Laws of the running mean against the theorem's envelope."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from bbvi_conv.monitor import Series, Strata, envelope, envelope_constant, envelope_slope, rates


def with_running_mean(series: Series, means: np.ndarray) -> Series:
    """The series whose running mean is exactly ``means``."""
    sums = means * series.stops
    return series._replace(values=np.diff(sums, prepend=0.0) / series.lengths)


@pytest.mark.parametrize("planted_slope", [-1.0, -0.25, 0.0, 0.4])
def test_slope_is_that_of_the_running_mean_over_the_envelope(
    planted: Callable[..., Series], planted_slope: float
) -> None:
    series = planted(lambda n: n**-0.5, 50_000, 0, spread=0.0, noise=0.0)
    stops = series.stops
    series = with_running_mean(series, 7.0 * stops**planted_slope * envelope(stops, 1.0))
    assert envelope_slope(series).value == pytest.approx(planted_slope, abs=1e-9)
    assert envelope_slope(series._replace(values=100 * series.values)).value == pytest.approx(planted_slope, abs=1e-9)
    constant = envelope_constant(series)
    early = stops[stops > math.e**2][:1]  # where the envelope begins to fall
    assert constant == pytest.approx(7.0 * early[0] ** planted_slope, rel=1e-9)


def exact(series: Series, truth: Callable[[np.ndarray], np.ndarray]) -> Series:
    """The same strata, every U replaced by the mean of the trajectory over its stratum: no draw, no noise."""
    cumulated = np.cumsum(truth(np.arange(1.0, series.stops[-1] + 1)))[series.stops.astype(int) - 1]
    return series._replace(values=np.diff(cumulated, prepend=0.0) / series.lengths)


@pytest.mark.parametrize("decay", [-0.3, -0.5])
def test_interval_of_the_slope_covers(planted: Callable[..., Series], decay: float) -> None:
    runs = [planted(lambda n: n**decay, 20_000, seed, spread=0.5, noise=0.5) for seed in range(200)]
    truth = envelope_slope(exact(runs[0], lambda n: n**decay)).value
    estimates = [envelope_slope(run) for run in runs]
    values = np.array([estimate.value for estimate in estimates])
    assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / math.sqrt(200) + 0.01
    inside = np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])
    assert inside > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 200)


def test_the_running_mean_alone_does_not_see_a_stall(planted: Callable[..., Series]) -> None:
    series = planted(lambda n: 0.01 + 1e3 * np.exp(-n / 20.0), 20_000, 0, spread=0.3, noise=0.3)
    both = rates(series)
    assert both.envelope_slope.high < 0.0  # the theorem's claim holds ...
    assert both.exponent.high > -0.25  # ... while nothing falls any more
    assert both.plateau.trend == "plateau"
    assert both.window[1] <= Strata().bounds(len(series.steps) - 1)[1]
    assert json.loads(json.dumps(both.to_json()))["plateau"]["trend"] == "plateau"


def test_a_run_too_short_or_too_noisy_says_so(planted: Callable[..., Series]) -> None:
    short = rates(planted(lambda n: n**-0.5, 25, 0, spread=0.0, noise=0.1))
    assert short.window is None
    assert "run at least 32 steps" in short.envelope_slope.reason
    assert json.loads(json.dumps(short.to_json()))["window"] is None
    series = planted(lambda n: n**-0.5, 20_000, 0, spread=0.0, noise=0.1)
    sunk = rates(series._replace(values=-series.values))
    assert "raise num_gradients" in sunk.envelope_slope.reason
    assert sunk.envelope_constant is None
