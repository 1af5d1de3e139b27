"""Objectives: log-weights in, bound and gradient out."""

from __future__ import annotations

from bbvi_conv.objectives.elbo import ELBO
from bbvi_conv.objectives.objective import Objective, Particles

OBJECTIVES: dict[str, type[ELBO]] = {"elbo": ELBO}
"""Name on the command line -> constructor."""

__all__ = ["ELBO", "OBJECTIVES", "Objective", "Particles"]
