"""Encoders as frozen values: from the shape of one datum to a network of features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import Tensor, nn


class Encoder(Protocol):
    """What makes a network from the shape of a datum."""

    def network(self, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
        """A network ``(B, *shape)`` to ``(B, features)``, and the number of features.

        Raises:
            ValueError: if data of that shape cannot be taken.
        """
        ...


@dataclass(frozen=True)
class MLP:
    """Fully connected layers with tanh; data are flattened.

    Args:
        hidden: units of each layer; the last are the features.

    Raises:
        ValueError: if there is no layer, or one without units.
    """

    hidden: tuple[int, ...] = (400,)

    def __post_init__(self) -> None:
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must hold at least one number of units, each at least 1, got {self.hidden}")

    def network(self, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
        """Flatten, then linear and tanh by turns."""
        sizes = (math.prod(shape), *self.hidden)
        layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.Tanh())]
        return nn.Sequential(_Flat(len(shape)), *layers), self.hidden[-1]


@dataclass(frozen=True)
class Conv:
    """Convolutions that halve height and width, with SiLU, then one fully connected layer.

    Args:
        channels: of each convolution (kernel 4, stride 2, padding 1).
        hidden: features.

    Raises:
        ValueError: if a number is below 1.
    """

    channels: tuple[int, ...] = (32, 64)
    hidden: int = 256

    def __post_init__(self) -> None:
        if not self.channels or min(*self.channels, self.hidden) < 1:
            raise ValueError(f"channels and hidden must be at least 1, got {self.channels} and {self.hidden}")

    def network(self, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
        """For data ``(H, W)`` or ``(C, H, W)``."""
        if len(shape) not in (2, 3):
            raise ValueError(f"a convolutional encoder takes data (H, W) or (C, H, W), got shape {tuple(shape)}")
        first, height, width = shape if len(shape) == 3 else (1, *shape)
        for _ in self.channels:
            height, width = height // 2, width // 2
        if min(height, width) < 1:
            raise ValueError(f"data of shape {tuple(shape)} are too small for {len(self.channels)} halvings")
        sizes = (first, *self.channels)
        layers = [layer for i, o in pairwise(sizes) for layer in (nn.Conv2d(i, o, 4, stride=2, padding=1), nn.SiLU())]
        last = nn.Linear(self.channels[-1] * height * width, self.hidden)
        return nn.Sequential(_Channels(len(shape)), *layers, nn.Flatten(), last, nn.SiLU()), self.hidden


class _Flat(nn.Module):
    """``(B, *shape)`` to ``(B, numel)``, a scalar datum included."""

    only_reshapes = True

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(-self.dims) if self.dims else x.unsqueeze(-1)


class _Channels(nn.Module):
    """``(B, H, W)`` to ``(B, 1, H, W)``."""

    only_reshapes = True

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x if self.dims == 3 else x.unsqueeze(-3)


ENCODERS = {"mlp": MLP, "conv": Conv}
"""Name -> constructor."""
