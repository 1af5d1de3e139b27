"""Threads that advance several runs at once."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from bbvi_conv.engine.workers import Workers


def count(to: int, seen: list[tuple[str, int]]) -> Iterator[int]:
    for number in range(to):
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        time.sleep(0.01)
        yield number


def test_each_run_gives_its_elements_in_order_and_all_threads_work() -> None:
    before, seen = torch.get_num_threads(), []
    found = Workers(2).exhaust([count(4, seen), count(0, seen), count(3, seen)])
    assert found == [[0, 1, 2, 3], [], [0, 1, 2]]
    assert len({name for name, _ in seen}) == 2
    assert {threads for _, threads in seen} == {1}
    fresh: list[int] = []
    other = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert torch.get_num_threads() == before == fresh[0]


def test_a_failure_stops_every_run_and_is_raised() -> None:
    moved: list[tuple[str, int]] = []

    def fail() -> Iterator[int]:
        yield 0
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        Workers(2).exhaust([count(100, moved), fail()])
    reached = len(moved)
    assert reached < 100
    time.sleep(0.05)
    assert len(moved) == reached


FORKS = """
import multiprocessing
import torch, pyro, pyro.distributions as dist
import bbvi_conv as bc

def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

def fitted(seed):
    fit = bc.fit(model, args=(torch.linspace(-1, 1, 1000),), max_steps=100, engine="traced", seed=seed, progress=False)
    return fit.state.step, torch.get_num_threads()

print(*fitted(0))
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(*pool.apply_async(fitted, [1]).get(timeout=60))
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here")
def test_a_process_forked_after_a_fit_can_fit() -> None:
    """torch's threads are not there any more."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FORKS], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["100", "2", "100", "1"]
