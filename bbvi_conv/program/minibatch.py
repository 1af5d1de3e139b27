"""Minibatches: which rows a step sees, and how rows become a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bbvi_conv.program.noise import generator


class Batch(NamedTuple):
    """What varies from step to step: gathered ``args`` (leading dimension B) and, for ``plate(N, B)``, the row indices.

    Both are empty when every step sees the whole data.
    """

    args: tuple[Tensor, ...] = ()
    indices: Tensor | None = None


@dataclass(frozen=True)
class Minibatch:
    """Rows for one step, drawn from the N rows of the data.

    Positional arguments whose leading dimension is N are gathered. The named plate then has the batch size, as in
    ``plate("data", len(x))``, and its terms are scaled by N/B for the user; or it is a plate of N that takes what a
    loader gives, ``plate("data", N, len(x))`` or ``plate("data", N, subsample=x)``. Or nothing is gathered, and
    ``plate("data", N, subsample_size=B)`` receives the row indices.

    Args:
        size: B, rows a step.
        plate: name of the plate whose rows are subsampled.
        sampling: ``"iid"`` draws B rows with replacement, independently at every step; ``"epoch"`` goes through a
            fresh permutation each epoch (a last part shorter than B is left out).

    Raises:
        ValueError: if ``size`` is below 1 or ``sampling`` is unknown.

    Example:
        >>> Minibatch(128, plate="data").sampling
        'iid'
    """

    size: int
    plate: str
    sampling: Literal["iid", "epoch"] = "iid"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Minibatch size must be at least 1, got {self.size}")
        if self.sampling not in ("iid", "epoch"):
            raise ValueError(f'Minibatch sampling must be "iid" or "epoch", got {self.sampling!r}')

    def indices(
        self, seed: int, step: int, count: int, total: int, block: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Row indices ``(count, B)`` of the steps ``step .. step + count - 1``, drawn by the block or epoch."""
        per_draw = block if self.sampling == "iid" else total // self.size
        first, last = step // per_draw, (step + count - 1) // per_draw

        def draw(number: int) -> Tensor:
            gen = generator(seed, "minibatch", number, device)
            if self.sampling == "iid":
                return torch.randint(total, (per_draw, self.size), generator=gen, device=device)
            rows = torch.randperm(total, generator=gen, device=device)
            return rows[: per_draw * self.size].reshape(per_draw, self.size)

        rows = torch.cat([draw(number) for number in range(first, last + 1)])
        start = step - first * per_draw
        return rows[start : start + count]
