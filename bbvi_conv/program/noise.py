"""Base noise: how much one run of the program consumes, and reproducible blocks of it.

Noise is drawn in blocks of ``BLOCK`` steps keyed ``(seed, stream, block)``: chunk boundaries may fall anywhere and a
resumed run sees the same numbers, because a block depends on nothing but its key.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 256
"""Steps in one block of noise."""


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
        device = generator.device
        normal = torch.randn(*leading, self.normal, generator=generator, dtype=dtype, device=device)
        uniform = torch.rand(*leading, self.uniform, generator=generator, dtype=dtype, device=device)
        return Noise(normal, uniform.clamp_(torch.finfo(dtype).tiny, 1 - torch.finfo(dtype).eps))


def generator(seed: int, stream: str, block: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on ``(seed, stream, block)`` only; streams are independent of each other."""
    key = np.random.SeedSequence([seed, zlib.crc32(stream.encode()), block]).generate_state(2, np.uint32)
    return torch.Generator(device=device).manual_seed((int(key[0]) << 31) ^ int(key[1]))
