"""More draws as the run goes on: by plan, or while the measured signal for phi allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from bbvi_conv.objectives.checks import check_count
from bbvi_conv.objectives.importance import CIWAE, IWAE, MIWAE, VRIWAE


class LookLike(Protocol):
    """What a schedule reads of a look: its step, and phi's signal-to-noise ratio."""

    @property
    def step(self) -> int:
        """Steps made."""
        ...

    def signal_to_noise(self, figure: str) -> float | None:
        """Of one gradient that trains; None without noise, or without such parameters."""
        ...


@dataclass(frozen=True)
class GrowingParticles:
    r"""The objective with K multiplied by ``factor`` every ``every`` steps, up to ``stop``.

    With ``snr`` the raise happens only if the latest look before it found phi's signal-to-noise ratio
    :math:`\sqrt{U / \operatorname{tr}\Sigma}` of one gradient at ``snr`` or above: K grows while phi can afford it.
    A run that follows a plan is not done before K has reached ``stop``. A resumed run makes the same choices, since
    they follow from steps and looks alone. For :func:`bbvi_conv.fit` only.

    Args:
        objective: the bound at its first K.
        stop: largest K.
        every: steps between raises.
        factor: of K at a raise.
        snr: threshold, or None for a plan by steps alone.

    Raises:
        ValueError: counts below 1, a factor below 2, or ``stop`` below the first K.

    Reference: Surendran et al. (2025), experiments with growing K.
    """

    objective: IWAE | VRIWAE | MIWAE | CIWAE
    stop: int
    every: int = 1000
    factor: int = 2
    snr: float | None = None

    def __post_init__(self) -> None:
        check_count("every", self.every)
        if self.factor < 2:
            raise ValueError(f"factor must be at least 2, got {self.factor}")
        if self.stop < self.objective.num_particles:
            raise ValueError(f"stop must be at least the first K, {self.objective.num_particles}, got {self.stop}")
        if self.snr is not None and not self.snr > 0:
            raise ValueError(f"snr must be positive, got {self.snr}")

    def at(self, step: int, looks: Sequence[LookLike]) -> IWAE | VRIWAE | MIWAE | CIWAE:
        """The objective in force after ``step`` steps and these looks."""
        count = self.objective.num_particles
        for mark in range(self.every, step + 1, self.every):
            if count >= self.stop:
                break
            if self.snr is None or _signal(looks, mark) >= self.snr:
                count = min(self.stop, count * self.factor)
        return replace(self.objective, num_particles=count)

    def next_change(self, step: int) -> int:
        """The next step at which K may be raised."""
        return (step // self.every + 1) * self.every

    def settled(self, step: int, looks: Sequence[LookLike]) -> bool:
        """Whether K has reached ``stop``; where it waits for the signal of phi, a run may be done at any K."""
        return self.snr is not None or self.at(step, looks).num_particles == self.stop


def _signal(looks: Sequence[LookLike], before: int) -> float:
    """Phi's signal-to-noise ratio at the latest look before a step; 0 where there is none."""
    past = [signal for look in looks if look.step < before and (signal := look.signal_to_noise("phi")) is not None]
    return past[-1] if past else 0.0
