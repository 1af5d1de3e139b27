"""Laws of the plateau test: a floor is a plateau, a decay never is, and what cannot be told apart is left undecided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from bbvi_conv.monitor import Series, plateau

NOISES = [(0.2, 0.2), (0.5, 0.5), (1.0, 0.5)]


def trends(planted: Callable[..., Series], truth: Callable, steps: int, spread: float, noise: float) -> Counter[str]:
    return Counter(plateau(planted(truth, steps, seed, spread=spread, noise=noise)).trend for seed in range(100))


@pytest.mark.parametrize(("spread", "noise"), NOISES)
@pytest.mark.parametrize("exponent", [-0.5, -1.0])
def test_a_decay_is_not_a_plateau(planted: Callable[..., Series], exponent: float, spread: float, noise: float) -> None:
    found = trends(planted, lambda n: n**exponent, 20_000, spread, noise)
    assert found["plateau"] <= 2
    assert found["decaying"] >= 85


@pytest.mark.parametrize(("spread", "noise"), NOISES)
def test_a_floor_is_a_plateau(planted: Callable[..., Series], spread: float, noise: float) -> None:
    found = trends(planted, lambda n: 0.0 * n + 0.1, 50_000, spread, noise)
    assert found["plateau"] >= 75
    assert found["decaying"] + found["rising"] <= 15  # 2.5% a window and side, at most three windows


def test_an_old_transient_does_not_hide_a_stall(planted: Callable[..., Series]) -> None:
    found = trends(planted, lambda n: 1.0 + 1e3 * np.exp(-n / 50.0), 20_000, 0.3, 0.3)
    assert found["plateau"] >= 80


def test_a_decay_that_has_just_met_its_floor_is_not_called_a_plateau(planted: Callable[..., Series]) -> None:
    found = trends(planted, lambda n: 1.0 / np.minimum(n, 10_000.0), 20_000, 0.3, 0.3)
    assert found["plateau"] <= 5


def test_growth_is_told(planted: Callable[..., Series]) -> None:
    found = trends(planted, lambda n: n**1.0, 20_000, 0.3, 0.03)
    assert found["rising"] >= 95


def test_an_undecided_run_says_what_is_missing(planted: Callable[..., Series]) -> None:
    noisy = plateau(planted(lambda n: 0.0 * n + 1.0, 3000, 2, spread=1.4, noise=1.0))
    assert noisy.trend == "undecided"
    assert "run more steps" in noisy.reason or "raise num_gradients" in noisy.reason
    short = plateau(planted(lambda n: 0.0 * n + 1.0, 7, 0, spread=0.1, noise=0.1))
    assert (short.trend, short.window) == ("undecided", None)
    assert "run at least 10 steps" in short.reason
    with pytest.raises(ValueError, match="must be negative"):
        plateau(planted(lambda n: n, 300, 0, spread=0.1, noise=0.1), threshold=0.1)
