"""Optimisers in functional form, step-size rules and iterate averages; all are pure functions of tensors."""

from __future__ import annotations

from bbvi_conv.optim.averages import Average, empty_average, include
from bbvi_conv.optim.first_order import SGD, Adam, Optimiser
from bbvi_conv.optim.projected import Ball, Projected, ProjectedSGD, ScaleFloor, TheoremAdam, gradient_mapping
from bbvi_conv.optim.proximal import ProximalSGD
from bbvi_conv.optim.scales import Scales
from bbvi_conv.optim.step_sizes import Constant, CosineDecay, ExponentialDecay, InverseLinear, InverseSqrt, StepSize
from bbvi_conv.optim.within import Within

__all__ = [
    "SGD",
    "Adam",
    "Average",
    "Ball",
    "Constant",
    "CosineDecay",
    "ExponentialDecay",
    "InverseLinear",
    "InverseSqrt",
    "Optimiser",
    "Projected",
    "ProjectedSGD",
    "ProximalSGD",
    "ScaleFloor",
    "Scales",
    "StepSize",
    "TheoremAdam",
    "Within",
    "empty_average",
    "gradient_mapping",
    "include",
]
