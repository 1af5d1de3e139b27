"""Objectives: log-weights in, bound and gradient out."""

from __future__ import annotations

from collections.abc import Callable

from bbvi_conv.objectives.elbo import ELBO, LinearWarmup
from bbvi_conv.objectives.growing import GrowingParticles
from bbvi_conv.objectives.importance import CIWAE, IWAE, MIWAE, VRIWAE
from bbvi_conv.objectives.objective import Evaluation, Objective
from bbvi_conv.objectives.pair import PIWAE, Pair

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "elbo": ELBO,
    "iwae": IWAE,
    "vr-iwae": VRIWAE,
    "miwae": MIWAE,
    "ciwae": CIWAE,
    "piwae": PIWAE,
}
"""Name on the command line -> constructor."""

__all__ = [
    "CIWAE",
    "ELBO",
    "IWAE",
    "MIWAE",
    "OBJECTIVES",
    "PIWAE",
    "VRIWAE",
    "Evaluation",
    "GrowingParticles",
    "LinearWarmup",
    "Objective",
    "Pair",
]
