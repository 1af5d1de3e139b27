"""The table of cases."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.case import Case
from benchmarks.cases.flow import iaf, real_nvp
from benchmarks.cases.garch import garch
from benchmarks.cases.gaussian import eight_schools, gaussian_process, many_latents
from benchmarks.cases.regression import hierarchical, logistic
from benchmarks.cases.vae import conv_vae, iwae_5, iwae_50, vae

CASES: dict[str, Callable[[], Case]] = {
    "logistic": logistic,
    "logistic-minibatch": lambda: logistic(50_000, 100, 256),
    "eight-schools": eight_schools,
    "hierarchical": hierarchical,
    "gaussian-process": gaussian_process,
    "many-latents": many_latents,
    "garch": garch,
    "vae": vae,
    "vae-iwae-5": iwae_5,
    "vae-iwae-50": iwae_50,
    "conv-vae": conv_vae,
    "iaf": iaf,
    "real-nvp": real_nvp,
}
"""Name -> constructor."""
