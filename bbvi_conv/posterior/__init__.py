"""What a fitted guide says: draws, densities, ArviZ exports, and the Pareto k-hat."""

from __future__ import annotations

from bbvi_conv.posterior.draws import Draws, draw
from bbvi_conv.posterior.export import to_arviz, to_datatree, to_inference_data, write_netcdf
from bbvi_conv.posterior.neutral import Named, Neutral, from_program, neutral
from bbvi_conv.posterior.psis import Tail, khat_threshold, pareto_shape, tail

__all__ = [
    "Draws",
    "Named",
    "Neutral",
    "Tail",
    "draw",
    "from_program",
    "khat_threshold",
    "neutral",
    "pareto_shape",
    "tail",
    "to_arviz",
    "to_datatree",
    "to_inference_data",
    "write_netcdf",
]
