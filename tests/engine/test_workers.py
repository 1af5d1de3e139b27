"""Threads that advance several runs at once."""

from __future__ import annotations

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
