"""Encoders as frozen values: from the shape of one datum to a network of features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import nn


class Encoder(Protocol):
    """What makes a network from the shape of a datum."""

    def network(self, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
        """A network ``(B, *shape)`` to ``(B, features)``, and the number of features.

        Raises:
            ValueError: if data of that shape cannot be taken.
        """
        ...


def check_hidden(hidden: tuple[int, ...]) -> None:
    """Refuse hidden layers that are none, or without units.

    Raises:
        ValueError: naming what came.
    """
    if not hidden or min(hidden) < 1:
        raise ValueError(f"hidden must hold at least one number of units, each at least 1, got {hidden}")


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
        check_hidden(self.hidden)

    def network(self, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
        """Flatten, then linear and tanh by turns."""
        sizes = (math.prod(shape), *self.hidden)
        layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.Tanh())]
        flat = nn.Flatten(-len(shape)) if shape else nn.Unflatten(-1, (-1, 1))  # a datum may be a single number
        return nn.Sequential(flat, *layers), self.hidden[-1]


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
        channel = nn.Identity() if len(shape) == 3 else nn.Unflatten(-2, (1, shape[0]))
        return nn.Sequential(channel, *layers, nn.Flatten(), last, nn.SiLU()), self.hidden


ENCODERS = {"mlp": MLP, "conv": Conv}
"""Name -> constructor."""
