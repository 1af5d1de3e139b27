"""What a run was made from: a model, its guide, their data, and the file they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bbvi_conv.families import MeanField
from bbvi_conv.program.build import build, positional
from bbvi_conv.program.device import with_index
from bbvi_conv.program.faithful import check_gaps, with_gaps
from bbvi_conv.program.program import Program
from bbvi_conv.program.structure import not_finite
from bbvi_conv.run import Settings


class ModelSource(NamedTuple):
    """Where a model came from, so that a run directory can find it again: a file and a name in it."""

    path: str
    name: str | None = None


class Recipe(NamedTuple):
    """Model, guide and data as :func:`bbvi_conv.fit` was given them; ``program`` is the same under every seed but the
    start of its parameters.

    Attributes:
        model, guide: Pyro programs; without a guide the settings' family makes one.
        args, kwargs: all N rows.
        source: the file they came from, if any.
        held_out: positional arguments over held-out rows, or None.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: ModelSource | None
    held_out: tuple[Any, ...] | None = None

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None,
        args: tuple[Any, ...] | Tensor,
        kwargs: dict[str, Any] | None,
        source: ModelSource | None = None,
        held_out: tuple[Any, ...] | Tensor | None = None,
    ) -> Recipe:
        """From what a user gives: a tensor alone is the only argument."""
        unseen = None if held_out is None else positional(held_out)
        return cls(model, guide, positional(args), kwargs or {}, source, unseen)

    def program(self, settings: Settings, seed: int | None = None) -> Program:
        """The traced program; ``seed`` is that of its initial parameters, by default the settings' own.

        Raises:
            ValueError: as for :func:`~bbvi_conv.program.build.build`.
        """
        return build(
            self.model,
            self.guide,
            self.args,
            self.kwargs,
            family=None if self.guide is not None else settings.family or MeanField(),
            minibatch=settings.minibatch,
            dtype=settings.dtype,
            device=device(settings.device),
            seed=settings.seed if seed is None else seed,
        )

    def unseen(self, program: Program) -> Program | None:
        """``program`` over the held-out rows, where there are any.

        Raises:
            ValueError: as for :meth:`~bbvi_conv.program.program.Program.with_data`, and for rows that are not finite.
        """
        if self.held_out is None:
            return None
        unseen = program.with_data(self.held_out)
        told = not_finite((f"argument {i} of held_out", a) for i, a in enumerate(self.held_out))
        with with_gaps(told):
            check_gaps(unseen, told)
        return unseen

    def remade(self, seed: int) -> Recipe:
        """The same with networks made anew under a seed, where a file makes them."""
        if self.source is None:
            return self
        from bbvi_conv.model_file import load_programs

        model, guide = load_programs(self.source.path, self.source.name, seed=seed)
        return self._replace(model=model, guide=guide)


def device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is a CUDA device where there is one.

    Raises:
        ValueError: an unknown name, or CUDA asked for where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError('device "cuda" was asked for, but torch sees no CUDA device; use device="cpu"')
    try:
        return with_index(name)
    except RuntimeError:
        raise ValueError(f'unknown device {name!r}; use "auto", "cpu" or "cuda"') from None
