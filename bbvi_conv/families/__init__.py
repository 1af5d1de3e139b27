"""Variational families: values that make a guide from a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bbvi_conv.families.amortized import Amortized
from bbvi_conv.families.flows import IAF, NeuralSpline, Planar, Radial, RealNVP, Sylvester
from bbvi_conv.families.full_rank import FullRank
from bbvi_conv.families.low_rank import LowRank
from bbvi_conv.families.mean_field import MeanField, ScoreMeanField
from bbvi_conv.families.mixture import Mixture
from bbvi_conv.families.scale_maps import SCALE_MAPS, Exp, Linear, SoftClip, Softplus
from bbvi_conv.families.structured import Structured
from bbvi_conv.families.student_t import StudentT

FAMILIES: dict[str, Callable[..., Any]] = {
    "mean-field": MeanField,
    "full-rank": FullRank,
    "low-rank": LowRank,
    "student-t": StudentT,
    "planar": Planar,
    "radial": Radial,
    "sylvester": Sylvester,
    "real-nvp": RealNVP,
    "iaf": IAF,
    "neural-spline": NeuralSpline,
    "mixture": Mixture,
    "structured": Structured,
    "amortized": Amortized,
}
"""Name on the command line -> constructor."""

__all__ = [
    "FAMILIES",
    "IAF",
    "SCALE_MAPS",
    "Amortized",
    "Exp",
    "FullRank",
    "Linear",
    "LowRank",
    "MeanField",
    "Mixture",
    "NeuralSpline",
    "Planar",
    "Radial",
    "RealNVP",
    "ScoreMeanField",
    "SoftClip",
    "Softplus",
    "Structured",
    "StudentT",
    "Sylvester",
]
