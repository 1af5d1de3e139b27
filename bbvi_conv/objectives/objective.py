"""What an objective is to the engines and the monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.program import Terms

Particles = Callable[..., Terms]
"""``(theta, phi_sample, phi_density, noise (M, ...), batch) -> Terms`` with M in front."""


class Objective(Protocol):
    """A bound as a small frozen value."""

    @property
    def draws(self) -> int:
        """Runs of the program in one evaluation."""
        ...

    @property
    def split(self) -> bool:
        """Whether the density needs its own copy of the variational parameters."""
        ...

    def surrogate(
        self,
        particles: Particles,
        theta: dict[str, Tensor],
        phi: dict[str, Tensor],
        noise: Noise,
        batch: Batch,
        *,
        scale: float,
        score: bool,
    ) -> Tensor:
        """Scalar negative bound, in nats summed over the data; the value is the bound's, the gradient the estimator's."""
        ...

    def quietest(self) -> Objective:
        """The same gradient in expectation, by the valid estimator with the least noise."""
        ...

    def single(self) -> Objective:
        """The same expectation at the least cost per evaluation, for when many are averaged anyway."""
        ...

    def plain(self) -> Objective:
        """The same bound by the pathwise estimator, one draw: twice differentiable on fixed noise."""
        ...
