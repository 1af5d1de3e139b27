"""Base noise: how much one run of the program consumes, and reproducible blocks of it.

Noise is drawn in blocks of steps keyed ``(seed, stream, block)``: chunk boundaries may fall anywhere and a resumed run
sees the same numbers, because a block depends on nothing but its key.
"""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

BLOCK = 256
"""Steps in one block of rows, and of noise where its steps hold neither few numbers nor too many."""
MOST_SPREAD = 1024
"""Numbers in one draw up to which draws are spread evenly: beyond, that takes long, and a few points fill no space."""
HALF_CELL = 2.0**-31
"""Half the distance between two values that a coordinate of a Sobol point may have."""


class Noise(NamedTuple):
    """Base noise of one or several runs: ``normal`` ``(..., n)`` and ``uniform`` ``(..., m)`` in the open (0, 1)."""

    normal: Tensor
    uniform: Tensor

    def at(self, index: int | slice) -> Noise:
        """Index or slice the first dimension of both parts alike."""
        return Noise(self.normal[index], self.uniform[index])


class NoiseLayout(NamedTuple):
    """How many standard normals and uniforms one run of model and guide consumes."""

    normal: int
    uniform: int

    def draw(self, generator: torch.Generator, *leading: int, dtype: torch.dtype) -> Noise:
        """Fresh noise with the given leading shape, on the generator's device."""
        normal = torch.randn(*leading, self.normal, generator=generator, dtype=dtype, device=generator.device)
        if not self.uniform:
            return Noise(normal, normal.new_empty(*leading, 0))
        uniform = torch.rand(*leading, self.uniform, generator=generator, dtype=dtype, device=generator.device)
        return Noise(normal, _inside(uniform))

    def spread(self, generator: torch.Generator, count: int, draws: int, *, dtype: torch.dtype) -> Noise:
        """Noise ``(count, draws, ...)`` of the same law, each one of ``count`` fresh, that fill the space evenly.

        Scrambled Sobol points: a mean of a smooth function over them is unbiased and far less noisy than over
        independent ones, but its draws are not independent of each other. Beyond ``MOST_SPREAD`` numbers in one it
        is :meth:`draw`.
        """
        size = self.normal + self.uniform
        if not 0 < draws * size <= MOST_SPREAD:
            return self.draw(generator, count, draws, dtype=dtype)
        with ALONE:  # torch makes the first point in its default dtype
            sobol = SobolEngine(draws * size, scramble=True, seed=generator.initial_seed())  # type: ignore[no-untyped-call]
        points = sobol.draw(count, dtype=torch.float64).reshape(count, draws, size) + HALF_CELL
        points = _inside(points.to(generator.device, dtype))
        return Noise(torch.special.ndtri(points[..., : self.normal]), points[..., self.normal :])


def _inside(uniform: Tensor) -> Tensor:
    """Kept off the ends of (0, 1)."""
    info = torch.finfo(uniform.dtype)
    return uniform.clamp(info.tiny, 1 - info.eps)


def generator(seed: int, stream: str, block: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on ``(seed, stream, block)`` only; streams are independent of each other."""
    key = np.random.SeedSequence([seed, zlib.crc32(stream.encode()), block]).generate_state(2, np.uint32)
    return torch.Generator(device=device).manual_seed((int(key[0]) << 31) ^ int(key[1]))


ALONE = threading.RLock()
"""Held while what all threads share is changed: torch's generators, default dtype and compiler, Pyro's store and
handlers. Fits in several threads take turns there, and run their steps at the same time."""


@contextmanager
def beside_torch(seed: int | None) -> Iterator[None]:
    """Leave the generators of NumPy and Python, from which models may draw, as found; they start from ``seed``."""
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002 - what plain np.random.* draws from
    if seed is not None:
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpys)  # noqa: NPY002
        random.setstate(pythons)


@contextmanager
def random_state(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Leave the generators of torch (the CPU's and that of ``device``), NumPy and Python as found.

    Inside they start from ``seed``.
    """
    with ALONE, ExitStack() as stack:
        stack.enter_context(beside_torch(seed))
        if device.type == "cpu":
            stack.enter_context(torch.random.fork_rng(devices=[]))
        else:
            module = torch.get_device_module(device)
            stack.enter_context(module.device(device))
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
            if seed is not None:
                module.manual_seed(seed)
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield
