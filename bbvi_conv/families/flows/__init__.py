"""Normalizing flows over the packed unconstrained vector."""

from __future__ import annotations

from bbvi_conv.families.flows.flows import IAF, NeuralSpline, Planar, Radial, RealNVP, Sylvester

__all__ = ["IAF", "NeuralSpline", "Planar", "Radial", "RealNVP", "Sylvester"]
