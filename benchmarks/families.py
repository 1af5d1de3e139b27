"""Gaussian families, ours, Pyro's and NumPyro's, and how our parameters read in NumPyro."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.tape import Tape, taped
from benchmarks.case import Arrays

MEAN_FIELD: dict[str, Any] = {"family": bc.MeanField()}
FULL_RANK: dict[str, Any] = {"family": bc.FullRank()}


def _mean_field_params(program: bc.Program, x: Tensor) -> Arrays:
    """``...locs.SITE`` and ``...scales.SITE`` as ``SITE_auto_loc`` and ``SITE_auto_scale``."""
    named = {}
    for name, value in program.constrained(x).items():
        _, kind, site = name.split(".", 2)
        named[f"{site}_auto_{kind.removesuffix('s')}"] = value.numpy()
    return named


def _full_rank_params(program: bc.Program, x: Tensor) -> Arrays:
    """Mean and factor of the packed vector; the sites come in the order of the model in both libraries' vectors."""
    loc, tril = mean_and_factor(program, x)
    return {"auto_loc": loc.numpy(), "auto_scale_tril": tril.numpy()}


def mean_and_factor(program: bc.Program, x: Tensor) -> tuple[Tensor, Tensor]:
    """m ``(D,)`` and L ``(D, D)`` of a guide that draws m + L e: its draws at e = 0 and at the unit vectors."""
    unit = torch.eye(program.layout.normal)

    def draws() -> list[Tensor]:
        found = []
        for noise in (0 * unit[0], *unit):
            with taped(Tape(Noise(noise, noise[:0]), {})):
                found.append(program.guide.get_posterior().rsample().detach())
        return found

    loc, *moved = program.bind(draws, x)()
    return loc, (torch.stack(moved, dim=1) - loc[:, None]).tril()


def _auto(name: str) -> Any:
    def pyro_guide(model: Any) -> Any:
        from pyro.infer import autoguide

        return getattr(autoguide, name)(model)

    return pyro_guide


MEAN_FIELD.update(params=_mean_field_params, pyro_guide=_auto("AutoNormal"))
FULL_RANK.update(params=_full_rank_params, pyro_guide=_auto("AutoMultivariateNormal"))
