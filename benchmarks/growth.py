"""How time per step and memory grow with rows, latent dimension, draws and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import bbvi_conv as bc
from benchmarks.case import Case
from benchmarks.cases.gaussian import many_latents
from benchmarks.cases.regression import logistic
from benchmarks.cases.vae import vae


class Growth(NamedTuple):
    """Sizes to go through, and the case of a size."""

    sizes: tuple[int, ...]
    case: Callable[[int], Case]


GROWTH: Mapping[str, Growth] = {
    "N": Growth((500, 5_000, 50_000), lambda rows: logistic(rows, 10)),
    "latents": Growth((100, 1_000, 10_000, 100_000), many_latents),
    "K": Growth((1, 5, 50), lambda k: vae(bc.IWAE(k), rows=4096, steps=max(2, 64 // k))),
    "S": Growth((1, 8, 32), lambda seeds: replace(logistic(), seeds=seeds)),
}
"""What grows -> sizes and cases."""


def label(what: str, size: int) -> str:
    """Name of a row.

    >>> label("N", 500)
    'N=500'
    """
    return f"{what}={size}"
