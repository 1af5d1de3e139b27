"""A case: one problem, written once for Pyro (ours and Pyro's own loop) and once for NumPyro."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.run import Settings

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Twin:
    """The NumPyro side.

    Attributes:
        model, guide: NumPyro programs; with a minibatch they take ``rows=`` and draw rows themselves without it.
        args: arguments, resident arrays.
        loss: NumPyro's loss.
    """

    model: Callable[..., Any]
    guide: Any
    args: tuple[Any, ...]
    loss: Any


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        model: Pyro model.
        args: its positional arguments, all N rows.
        guide: Pyro guide, for all; or None, with
        family: ours, and
        pyro_guide: Pyro's own guide of the same family.
        minibatch: rows of a step.
        objective: bound of a step.
        step_size: of Adam, for all.
        twin: makes the NumPyro side.
        params: our parameters by name, constrained, as NumPyro's; None: where guides cannot be set equal.
        scaled: model and guide for Pyro's own loop given N/B; None: both scaled as a whole.
        pyro_bound: whether Pyro has this bound.
        scan: whether NumPyro's steps run inside ``lax.scan``; else one jitted call a step, where that is faster.
        seeds: S, independent runs at once.
        others: makes further contenders, by name: steps -> seconds a step.
        device: where ours runs.
        steps: steps of a turn of ours and NumPyro; Pyro makes ``pyro_steps``.
        notes: what a reader of the row should know.
    """

    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    twin: Callable[[], Twin]
    params: Callable[[bc.Program, Tensor], Arrays] | None
    guide: Callable[..., Any] | None = None
    family: Any = None
    pyro_guide: Callable[..., Any] | None = None
    minibatch: bc.Minibatch | None = None
    objective: Any = field(default_factory=lambda: bc.ELBO(1))
    step_size: float = 1e-2
    scaled: Callable[[float], tuple[Any, Any]] | None = None
    pyro_bound: bool = True
    others: dict[str, Callable[[], Callable[[int], float]]] = field(default_factory=dict)
    scan: bool = True
    seeds: int = 1
    device: str = "cpu"
    steps: int = 2048
    pyro_steps: int = 20
    notes: str = ""

    def program(self) -> bc.Program:
        """Ours, in float32 as NumPyro's default is."""
        return bc.build(
            self.model,
            self.guide,
            self.args,
            family=self.family,
            minibatch=self.minibatch,
            dtype=torch.float32,
            device=self.device,
        )

    def settings(self, **more: Any) -> Settings:
        """What ``bc.fit`` is given."""
        return Settings(
            objective=self.objective,
            optimiser=bc.Adam(bc.Constant(self.step_size)),
            minibatch=self.minibatch,
            dtype=torch.float32,
            num_seeds=self.seeds,
            device=self.device,
            **more,
        )

    @property
    def total(self) -> int:
        """N."""
        return len(self.args[0]) if self.minibatch else 1

    def in_pyro(self) -> tuple[Any, Any]:
        """Model and guide for Pyro's own loop, minibatches scaled to N."""
        guide = self.guide or (self.pyro_guide and self.pyro_guide(self.model))
        if self.minibatch is None:
            return self.model, guide
        factor = self.total / self.minibatch.size
        if self.scaled is not None:
            return self.scaled(factor)
        return poutine.scale(self.model, factor), poutine.scale(guide, factor)
