"""Noise and rows for steps: independent streams, drawn in blocks, taken from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bbvi_conv.program.noise import BLOCK, Noise, generator
from bbvi_conv.program.program import Program


class Feed(NamedTuple):
    """Consecutive steps: ``noise`` ``(T, M, ...)`` and ``rows`` ``(T, B)`` or None."""

    noise: Noise
    rows: Tensor | None


class Stream:
    """Noise of one purpose (``"optimise"``, ``"monitor"``, ``"evaluate"``, ``"predict"``), keyed by seed and name."""

    def __init__(self, program: Program, seed: int, name: str, draws: int) -> None:
        self.program, self.seed, self.name, self.draws = program, seed, name, draws
        self._held: tuple[int, Noise] | None = None

    def _block(self, block: int) -> Noise:
        if self._held is None or self._held[0] != block:
            gen = generator(self.seed, self.name, block, self.program.device)
            noise = self.program.layout.draw(gen, BLOCK, self.draws, dtype=self.program.dtype)
            self._held = (block, noise)
        return self._held[1]

    def steps(self, start: int, count: int) -> Iterator[Feed]:
        """Feeds that cover the steps ``start .. start + count - 1``, one per block touched."""
        end = start + count
        while start < end:
            block, offset = divmod(start, BLOCK)
            size = min(BLOCK - offset, end - start)
            noise = self._block(block)[offset : offset + size]
            yield Feed(noise, self._rows(start, size))
            start += size

    def _rows(self, start: int, size: int) -> Tensor | None:
        minibatch, total = self.program.minibatch, self.program.total
        if minibatch is None:
            return None
        return minibatch.indices(self.seed, start, size, total, BLOCK)

    def once(self, key: int, count: int) -> Feed:
        """``count`` independent evaluations under one key: fresh noise, fresh rows drawn i.i.d. from the whole data."""
        gen = generator(self.seed, self.name, key, self.program.device)
        noise = self.program.layout.draw(gen, count, self.draws, dtype=self.program.dtype)
        minibatch = self.program.minibatch
        if minibatch is None:
            return Feed(noise, None)
        rows_gen = generator(self.seed, f"{self.name} rows", key)
        return Feed(noise, torch.randint(self.program.total, (count, minibatch.size), generator=rows_gen))
