"""Noise spread evenly: each draw of the same law, their mean unbiased and more precise, the same for the same key."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scipy import stats

from bbvi_conv.program.noise import MOST_SPREAD, Noise, NoiseLayout, generator
from bbvi_conv.program.program import quiet_pyro

LAYOUT = NoiseLayout(3, 2)


def spread(key: int, count: int = 64, layout: NoiseLayout = LAYOUT, dtype: torch.dtype = torch.float64) -> Noise:
    return layout.spread(generator(0, "evaluate", key), count, 2, dtype=dtype)


@pytest.mark.parametrize("place", [0, 37])
def test_each_draw_follows_the_law(place: int) -> None:
    """Of many keys, the draw at one place: nothing but chance decides where it lies."""
    found = [spread(key).at(place) for key in range(400)]
    normal = torch.stack([noise.normal for noise in found]).reshape(400, -1)
    uniform = torch.stack([noise.uniform for noise in found]).reshape(400, -1)
    assert (normal.shape[1], uniform.shape[1]) == (6, 4)
    for column in normal.T:
        assert stats.kstest(column.numpy(), stats.norm.cdf).pvalue > 1e-4
    for column in uniform.T:
        assert stats.kstest(column.numpy(), stats.uniform.cdf).pvalue > 1e-4


def test_a_mean_is_unbiased_and_four_times_as_precise() -> None:
    def means(take: str) -> torch.Tensor:
        drawn = [getattr(LAYOUT, take)(generator(0, take, key), 64, 1, dtype=torch.float64) for key in range(200)]
        return torch.stack([(n.normal[:, 0, 0] ** 2 + n.normal[:, 0, 1] * n.uniform[:, 0, 0]).mean() for n in drawn])

    even, alone = means("spread"), means("draw")
    assert abs(float(even.mean()) - 1.0) < 4 * float(even.std()) / 200**0.5
    assert 16 * float(even.var()) < float(alone.var())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_key_gives_the_same_noise_in_the_open_interval(dtype: torch.dtype) -> None:
    noise, again, other = spread(1, 4096, dtype=dtype), spread(1, 4096, dtype=dtype), spread(2, 4096, dtype=dtype)
    assert noise.normal.dtype == noise.uniform.dtype == dtype
    assert torch.equal(noise.normal, again.normal)
    assert torch.equal(noise.uniform, again.uniform)
    assert not torch.equal(noise.normal, other.normal)
    assert bool(noise.normal.isfinite().all())
    assert float(noise.uniform.min()) > 0.0
    assert float(noise.uniform.max()) < 1.0


@pytest.mark.parametrize("layout", [NoiseLayout(0, 0), NoiseLayout(MOST_SPREAD // 2 + 1, 0)], ids=["none", "too many"])
def test_where_there_are_no_such_points_noise_is_drawn_as_ever(layout: NoiseLayout) -> None:
    drawn = layout.draw(generator(0, "evaluate", 3), 5, 2, dtype=torch.float64)
    assert torch.equal(spread(3, 5, layout).normal, drawn.normal)


def test_the_same_key_gives_the_same_noise_while_another_thread_has_its_turn() -> None:
    """Which has another default dtype."""
    alone, begun = spread(1).normal, threading.Event()

    def turn() -> None:
        with quiet_pyro({"params": {}, "constraints": {}}, torch.float64, torch.device("cpu")):
            begun.set()
            time.sleep(0.2)

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(turn)
        begun.wait()
        assert torch.equal(spread(1).normal, alone)
        done.result()
