"""Statistics of a run: gradient norms, strata of random iterates, rates. Data and pure updates."""

from bbvi_conv.monitor.gradient_norm import SquaredNorm, gram_matrix, squared_norm, total_gram
from bbvi_conv.monitor.intervals import Estimate, unavailable
from bbvi_conv.monitor.power_law import exponent
from bbvi_conv.monitor.rate import Rate, envelope, envelope_constant, envelope_slope, rates
from bbvi_conv.monitor.series import Series
from bbvi_conv.monitor.state import (
    Look,
    MonitorState,
    Summary,
    columns,
    from_rows,
    look,
    series,
    summary,
    to_rows,
    update,
)
from bbvi_conv.monitor.strata import Strata, running_mean, running_means
from bbvi_conv.monitor.trend import Plateau, plateau

__all__ = [
    "Estimate",
    "Look",
    "MonitorState",
    "Plateau",
    "Rate",
    "Series",
    "SquaredNorm",
    "Strata",
    "Summary",
    "columns",
    "envelope",
    "envelope_constant",
    "envelope_slope",
    "exponent",
    "from_rows",
    "gram_matrix",
    "look",
    "plateau",
    "rates",
    "running_mean",
    "running_means",
    "series",
    "squared_norm",
    "summary",
    "to_rows",
    "total_gram",
    "unavailable",
    "update",
]
