"""Threads that advance several runs at once, each run on one thread at a time; and those of forked processes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, partial
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operations on the calling thread alone.

    MKL obeys who spoke last, and threads of torch's own, once used, wait awake on the cores that workers need.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def one_thread_in_forks() -> None:
    """Let processes forked from this one, as those of a ``multiprocessing.Pool``, compute on one thread.

    The threads that torch's operations wait for are not copied: at the first operation of several, a fork would hang.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class Workers:
    """The calling thread and others, on each of which torch's operations and generated code use that thread alone.

    Args:
        count: how many in all, at least two.
    """

    def __init__(self, count: int) -> None:
        self._others = count - 1
        self._pool = ThreadPoolExecutor(self._others, "bbvi_conv", torch.set_num_threads, (1,))

    def exhaust(self, runs: Sequence[Iterator[T]]) -> list[list[T]]:
        """What each iterator gives; they move on by one element in turn.

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

        with one_thread():
            workers = [self._pool.submit(work) for _ in range(self._others)]
            try:
                work()
                wait(workers)
            finally:
                stopped = True
                wait(workers)
        for worker in workers:
            worker.result()
        return found
