"""Noise and rows for steps: independent streams, drawn in blocks, taken from anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import BLOCK, Noise, generator
from bbvi_conv.program.program import Program


class Feed(NamedTuple):
    """What T evaluations see: ``noise`` ``(T, M, ...)``; and ``rows`` ``(T, B)``, or batched ``args``, or neither.

    With S seeds at once every part has S after T: ``noise`` ``(T, S, M, ...)``, ``rows`` ``(T, S, B)``.
    """

    noise: Noise
    rows: Tensor | None = None
    args: tuple[Tensor, ...] | None = None

    @property
    def moving(self) -> bool:
        """Whether the batch differs between evaluations."""
        return self.rows is not None or self.args is not None

    def split(self, parts: int) -> list[Feed]:
        """Consecutive parts of it, as even as can be, none of them empty."""
        size = -(-len(self.noise.normal) // parts)
        cuts = [slice(begin, begin + size) for begin in range(0, len(self.noise.normal), size)]
        return [Feed(self.noise.at(cut), None if self.rows is None else self.rows[cut]) for cut in cuts]

    def batch(self, program: Program, index: int | slice) -> Batch:
        """The batch of one evaluation, or of several with T in front."""
        if self.args is not None:
            return Batch(tuple(a[index] for a in self.args))
        return program.batch(None if self.rows is None else self.rows[index])


FEW, LONGEST = 2**15, 2**11
"""Numbers and steps up to which a block is longer than ``BLOCK``: to begin one costs as much as 3,000 numbers."""

NUMBERS, NUMBERS_ON_DEVICE = 2**22, 2**26
"""Numbers that a block of noise may hold for one seed, on the CPU and on another device."""


def block_of(program: Program, draws: int) -> int:
    """Steps in a block of noise: ``BLOCK``; more where they hold few numbers, fewer where too many for one seed."""
    block, numbers = BLOCK, sum(program.layout) * draws
    while block < LONGEST and 2 * block * numbers <= FEW:
        block *= 2
    most = NUMBERS if program.device.type == "cpu" else NUMBERS_ON_DEVICE
    while block > 1 and block * numbers > most:
        block //= 2
    return block


class Stream:
    """Noise of one purpose (``"optimise"``, ``"monitor"``, ``"evaluate"``, ``"predict"``), keyed by seed and name.

    With ``num_seeds`` S > 1, :meth:`steps` gives what the streams of the seeds ``seed .. seed + S - 1`` give, side by
    side: what seed s sees does not depend on the others.
    """

    def __init__(self, program: Program, seed: int, name: str, draws: int, *, num_seeds: int = 1) -> None:
        self.program, self.seed, self.name, self.draws = program, seed, name, draws
        self.num_seeds = num_seeds
        self.block = block_of(program, draws)
        self._held: tuple[int, Noise] | None = None
        self._single = [Stream(program, seed + s, name, draws) for s in range(num_seeds)] if num_seeds > 1 else []
        self._several: dict[tuple[int, int], Stream] = {}

    def of_seeds(self, place: int | slice) -> Stream:
        """The stream of the seed of that place, or of several: the same one at every call, which holds its block."""
        if isinstance(place, int):
            return self._single[place]
        begin, end, _ = place.indices(self.num_seeds)
        if (begin, end) not in self._several:
            seed, count = self.seed + begin, end - begin
            self._several[begin, end] = Stream(self.program, seed, self.name, self.draws, num_seeds=count)
        return self._several[begin, end]

    def _block(self, block: int) -> Noise:
        if self._held is None or self._held[0] != block:
            self._held = (block, self._draw(block))
        return self._held[1]

    def _draw(self, block: int) -> Noise:
        if self._single:
            drawn = [one._draw(block) for one in self._single]
            return Noise(*(torch.stack(parts, 1) for parts in zip(*drawn, strict=True)))
        gen = generator(self.seed, self.name, block, self.program.device)
        return self.program.layout.draw(gen, self.block, self.draws, dtype=self.program.dtype)

    def steps(self, start: int, count: int) -> Iterator[Feed]:
        """Feeds that cover the steps ``start .. start + count - 1``, one per block touched."""
        end = start + count
        while start < end:
            block, offset = divmod(start, self.block)
            size = min(self.block - offset, end - start)
            noise = self._block(block).at(slice(offset, offset + size))
            yield Feed(noise, self._rows(start, size))
            start += size

    def _rows(self, start: int, size: int) -> Tensor | None:
        minibatch, total = self.program.minibatch, self.program.total
        if minibatch is None:
            return None
        device = self.program.device
        rows = [minibatch.indices(self.seed + s, start, size, total, BLOCK, device) for s in range(self.num_seeds)]
        return torch.stack(rows, 1) if self.num_seeds > 1 else rows[0]

    def once(self, key: int, count: int, *, spread: bool = False) -> Feed:
        """``count`` independent evaluations under one key: fresh noise, fresh rows drawn i.i.d. from the whole data.

        For one seed at a time; :func:`feed_of_all` puts several together. With ``spread`` the noise fills its space
        evenly instead, for a mean that needs no interval.
        """
        gen = generator(self.seed, self.name, key, self.program.device)
        draw = self.program.layout.spread if spread else self.program.layout.draw
        noise = draw(gen, count, self.draws, dtype=self.program.dtype)
        minibatch = self.program.minibatch
        if minibatch is None:
            return Feed(noise)
        rows_gen = generator(self.seed, f"{self.name} rows", key, self.program.device)
        size = (count, minibatch.size)
        return Feed(noise, torch.randint(self.program.total, size, generator=rows_gen, device=self.program.device))


def feed_of_all(feeds: Sequence[Feed]) -> Feed:
    """The evaluations of several feeds of one program, one feed after the other."""
    noise = Noise(*(torch.cat(parts) for parts in zip(*(feed.noise for feed in feeds), strict=True)))
    rows = [feed.rows for feed in feeds if feed.rows is not None]
    return Feed(noise, torch.cat(rows) if rows else None)
