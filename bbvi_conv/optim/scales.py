"""Where the scales of a linear parameterisation lie in the flat vector, for steps that treat them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Scales(NamedTuple):
    r"""Layout of the flat parameters ``(P,)`` and the weight of the entropy in the loss.

    Attributes:
        parts: lengths of consecutive pieces, and whether each consists of scales, that is of diagonal entries
            :math:`C_{ii}` of :math:`z = m + C \epsilon`.
        entropy: c, where the loss holds :math:`-c \sum_i \log C_{ii}`; the KL weight over the normaliser.
    """

    parts: tuple[tuple[int, bool], ...]
    entropy: float = 1.0

    def change(self, function: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
        """``x`` with its scales replaced by ``function(scales of x, scales of each of more)``; the rest as it was."""
        sizes = [size for size, _ in self.parts]
        pieces = zip(*(torch.split(v, sizes, -1) for v in (x, *more)), strict=True)
        changed = [
            function(*piece) if are_scales else piece[0]
            for piece, (_, are_scales) in zip(pieces, self.parts, strict=True)
        ]
        return torch.cat(changed, -1)

    def of(self, x: Tensor) -> Tensor:
        """The scales alone, in order."""
        pieces = torch.split(x, [size for size, _ in self.parts], -1)
        return torch.cat([piece for piece, (_, are_scales) in zip(pieces, self.parts, strict=True) if are_scales], -1)


def unbound(name: str) -> ValueError:
    """What to raise where an optimiser is asked for a step before it knows which parameters are scales."""
    return ValueError(f"{name} does not know which parameters are scales: bind it to their places with .bind(scales)")
