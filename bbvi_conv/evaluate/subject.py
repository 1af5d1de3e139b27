"""What is evaluated: a model and guide with their parameters, over data of our choice, a part of the rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from bbvi_conv.fitting import Fit
from bbvi_conv.program.build import build, positional
from bbvi_conv.program.minibatch import Batch, Minibatch
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.program import Program

Source = Fit | tuple[Callable[..., Any], Callable[..., Any]]
"""A fit, or a model and its guide with the parameters that they and Pyro's store now hold."""


class Subject(NamedTuple):
    """A program over the data and its parameters ``x`` ``(P,)``.

    Attributes:
        program: sees ``program.minibatch.size`` rows at a time, or where it has no minibatch all data as one unit.
        x: flat parameters.
    """

    program: Program
    x: Tensor

    @property
    def total(self) -> int:
        """N, units: rows of the data, or 1."""
        return self.program.total

    @property
    def num_parts(self) -> int:
        """How many batches :meth:`parts` gives."""
        minibatch = self.program.minibatch
        return 1 if minibatch is None else -(-self.total // minibatch.size)

    def parts(self) -> Iterator[tuple[Batch, int]]:
        """Batches over all rows in order, each with how many of its rows count; the last is filled up with row 0."""
        program = self.program
        if program.minibatch is None:
            yield program.batch(None), 1
            return
        size = program.minibatch.size
        for start in range(0, program.total, size):
            rows = torch.arange(start, start + size)
            counted = min(size, program.total - start)
            yield program.batch(torch.where(rows < program.total, rows, 0)), counted


def subject(
    source: Source, data: Any = None, *, batch: int, dtype: torch.dtype | None = None, from_prior: bool = False
) -> Subject:
    """The subject of an evaluation.

    Args:
        source: a fit, or ``(model, guide)``.
        data: positional arguments of the model, or its only one; None: those of the fit.
        batch: rows at a time.
        dtype: float type; None: the fit's, for a pair float32.
        from_prior: put the prior in the place of the guide.

    Raises:
        TypeError: a source that is neither.
        ValueError: no data, or units that are not the rows of one plate.
    """
    kwargs: dict[str, Any] = {}
    device: torch.device | None
    if isinstance(source, Fit):
        own = source.program
        model, guide, args, kwargs = own.model, own.guide, own.args, own.kwargs
        unit, dtype, device = own.structure.unit, dtype or own.dtype, own.device
        _check_units(own)
    elif isinstance(source, tuple) and len(source) == 2 and all(callable(part) for part in source):
        model, guide = source
        if data is None:
            raise ValueError("data are needed to evaluate a model and a guide: give the model's positional arguments")
        args, unit, dtype, device = (), None, dtype or torch.float32, None
    else:
        raise TypeError(f"evaluate a fit or a pair (model, guide), got {type(source).__name__}")
    if data is not None:
        args = positional(data)
    loop = not isinstance(source, Fit)
    if unit is None:
        few = _first_rows(args, 2)
        found = build(model, guide, few, kwargs, dtype=dtype, device=device, loop=loop)
        _check_units(found)
        unit = found.structure.unit
    if from_prior:
        guide = _prior(model, guide, _first_rows(args, 2), kwargs, dtype, device, loop)
    minibatch = Minibatch(min(batch, _rows(args)), plate=unit[0]) if unit else None
    loop = loop and minibatch is not None
    with source.program.networks_kept() if isinstance(source, Fit) else nullcontext():
        program = build(model, guide, args, kwargs, minibatch=minibatch, dtype=dtype, device=device, loop=loop)
    if isinstance(source, Fit):
        program.buffers = [one for one in source.program.buffers if one.module in program.modules]
    return Subject(program, _parameters(program, source))


def _parameters(program: Program, source: Source) -> Tensor:
    """Those of the fit by name, or those the program was built with."""
    x = program.initial()
    if not isinstance(source, Fit):
        return x
    values = {name: value for group in source.params.values() for name, value in group.items()}
    missing = [leaf.name for leaf in program.leaves if leaf.name not in values]
    if missing:
        raise ValueError(f"the fit holds no parameter {missing[0]!r}, which its program has over these data")
    return program.replaced(x, values)


def drawn(program: Program, x: Tensor, noise: Noise, batch: Batch) -> dict[str, Tensor]:
    """Values of the latent sites at one draw of the guide, by name."""
    with torch.no_grad(), program.networks_kept():
        trace = program.drawn(x, noise, batch)
    return {site.name: trace.nodes[site.name]["value"] for site in program.structure.latents}


def _rows(args: tuple[Any, ...]) -> int:
    """N, by the first tensor that has rows."""
    return next((len(a) for a in args if isinstance(a, Tensor) and a.dim()), 1)


def _first_rows(args: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    rows = _rows(args)
    return tuple(a[:count] if isinstance(a, Tensor) and a.dim() and len(a) == rows else a for a in args)


def _check_units(program: Program) -> None:
    """Units are the rows of one plate, or the whole; and nothing observed lies outside them."""
    structure = program.structure
    if len(structure.unit) > 1:
        raise ValueError(f"units of several plates {structure.unit} are not evaluated; put the rows in one plate")
    outside = next((site.name for site in structure.observed if not site.in_unit), None)
    if outside is not None:
        raise ValueError(
            f"site {outside!r} depends on no latent, so its log density is no part of a unit: leave it out"
        )


def _prior(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype | None,
    device: torch.device | None,
    loop: bool,
) -> Callable[..., Any]:
    """The model without its observed sites, as a guide."""
    structure = build(model, guide, args, kwargs, dtype=dtype, device=device, loop=loop).structure
    observed = [site.name for site in structure.observed]
    return poutine.block(model, hide=observed)  # type: ignore[no-any-return]
