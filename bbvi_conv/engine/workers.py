"""Threads that advance several runs at once, each run on one thread at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")


class Workers:
    """So many threads, on each of which torch's operations and generated code use that thread alone.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, "bbvi_conv", torch.set_num_threads, (1,))

    def exhaust(self, runs: Sequence[Iterator[T]]) -> list[list[T]]:
        """What each iterator gives; they move on by one element at a time, first come first served.

        Meanwhile the calling thread, which waits, has one thread as well: MKL obeys who spoke last.

        Raises:
            Exception: of the first that fails, when none is moving any more.
        """
        found: list[list[T]] = [[] for _ in runs]
        moving: dict[Future[T | None], int] = {}

        def move(number: int) -> None:
            moving[self._pool.submit(next, runs[number], None)] = number

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for number in range(len(runs)):
                move(number)
            while moving:
                for done in wait(moving, return_when=FIRST_COMPLETED).done:
                    number, element = moving.pop(done), done.result()
                    if element is not None:
                        found[number].append(element)
                        move(number)
        finally:
            for waiting in moving:
                waiting.cancel()
            wait(moving)
            torch.set_num_threads(threads)
        return found
