"""Threads that advance several runs at once, each run on one thread at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")


class Workers:
    """So many threads, on each of which torch's operations and generated code use that thread alone.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "bbvi_conv", torch.set_num_threads, (1,))

    def exhaust(self, runs: Sequence[Iterator[T]]) -> list[list[T]]:
        """What each iterator gives; they move on by one element in turn.

        Meanwhile the calling thread, which waits, has one thread as well: MKL obeys who spoke last.

        Raises:
            Exception: of the first that fails, when none is moving any more.
        """
        found: list[list[T]] = [[] for _ in runs]
        waiting, stopped = deque(enumerate(runs)), False

        def work() -> None:
            nonlocal stopped
            while not stopped:
                try:
                    number, run = waiting.popleft()
                except IndexError:
                    return
                try:
                    found[number].append(next(run))
                except StopIteration:
                    continue
                except BaseException:
                    stopped = True
                    raise
                waiting.append((number, run))

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        workers = [self._pool.submit(work) for _ in range(self.count)]
        try:
            wait(workers)
        finally:
            stopped = True
            wait(workers)
            torch.set_num_threads(threads)
        for worker in workers:
            worker.result()
        return found
