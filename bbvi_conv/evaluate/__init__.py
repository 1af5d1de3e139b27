"""How good a fitted model and its inference are: log-likelihoods, inference gaps, the use made of latents."""

from __future__ import annotations

from bbvi_conv.evaluate.annealing import annealed_log_likelihood
from bbvi_conv.evaluate.gaps import Gaps, elbo, inference_gaps
from bbvi_conv.evaluate.importance import log_likelihood
from bbvi_conv.evaluate.latents import Latents, latents
from bbvi_conv.evaluate.result import LogLikelihood, PerDatum

__all__ = [
    "Gaps",
    "Latents",
    "LogLikelihood",
    "PerDatum",
    "annealed_log_likelihood",
    "elbo",
    "inference_gaps",
    "latents",
    "log_likelihood",
]
