"""Variational families: values that make a guide from a model."""

from __future__ import annotations

from collections.abc import Callable

from bbvi_conv.families.location_scale import FullRank, MeanField

FAMILIES: dict[str, Callable[..., MeanField | FullRank]] = {"mean-field": MeanField, "full-rank": FullRank}
"""Name on the command line -> constructor."""

__all__ = ["FAMILIES", "FullRank", "MeanField"]
