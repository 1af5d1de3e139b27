"""An optimiser of one part of the parameters; the others stay as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bbvi_conv.optim.first_order import Optimiser
from bbvi_conv.optim.step_sizes import StepSize


@dataclass(frozen=True)
class Within:
    """Steps on the coordinates ``start .. stop - 1``, as in the two halves of an EM algorithm.

    Args:
        optimiser: makes the steps; its state is of that part alone.
        start, stop: the part.

    Raises:
        ValueError: if the part is empty.

    Example:
        >>> from bbvi_conv.optim import SGD, Constant
        >>> rule, x = Within(SGD(Constant(1.0)), 1, 2), torch.zeros(3)
        >>> rule.update(torch.ones(3), rule.init(x), x, torch.ones(()))[0].tolist()
        [0.0, -1.0, 0.0]
    """

    optimiser: Optimiser
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a part must hold at least one coordinate, got {self.start} to {self.stop}")

    @property
    def step_size(self) -> StepSize:
        """Of the optimiser inside."""
        rule: StepSize = self.optimiser.step_size  # type: ignore[attr-defined]
        return rule

    def init(self, x: Tensor) -> tuple[Tensor, ...]:
        """State of the optimiser inside, for the part."""
        return self.optimiser.init(x[..., self.start : self.stop])

    def update(
        self, grad: Tensor, state: tuple[Tensor, ...], x: Tensor, n: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of the part."""
        part = slice(self.start, self.stop)
        moved, state = self.optimiser.update(grad[..., part], state, x[..., part], n)
        return torch.cat([x[..., : self.start], moved, x[..., self.stop :]], -1), state
