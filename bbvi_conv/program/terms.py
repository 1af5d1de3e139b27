"""From a pair of Pyro traces to log densities per conditionally independent unit."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from bbvi_conv.program.enumeration import apart, sums
from bbvi_conv.program.structure import Structure, innermost, random_sites, strata_of


class Terms(NamedTuple):
    """Log densities of one draw, in nats.

    Attributes:
        log_p: ``(..., U)``, latent sites and what depends on them, per unit, minibatch scale left out; enumerated
            sites summed out.
        log_q: ``(..., U)``, guide sites, per unit, likewise.
        log_prior: ``(..., U)``, the part of ``log_p`` from latent sites.
        free: ``(...)``, observed sites that depend on no latent, minibatch scale included.
        score: ``(..., U)``, the part of ``log_q`` from sites without a pathwise gradient, always by ``phi_sample``.
        weight: ``(..., U)`` or ``(..., 1)``, of the stratum drawn, with mean one over the strata; one without strata.

    A site with an analytic KL adds minus that KL to ``log_prior`` and ``log_p``, and nothing to ``log_q``.
    """

    log_p: Tensor
    log_q: Tensor
    log_prior: Tensor
    free: Tensor
    score: Tensor
    weight: Tensor


class Scaling(Protocol):
    """How a run takes minibatch scales out of log-probabilities, and what they are."""

    def scale_of(self, site: dict[str, Any]) -> Any:
        """Scale of a site, the user's in, those of minibatches out."""
        ...

    def factor(self, frame: Any) -> float:
        """N/B of a plate; 1 where it is not subsampled."""
        ...


def density_of(site: dict[str, Any], scaling: Scaling) -> Tensor:
    """Log-probability of a site by batch dimension, masks and the user's scales in, minibatch scales out."""
    density: Tensor = scale_and_mask(site["unscaled_log_prob"], scaling.scale_of(site), site["mask"])
    return density


def fold(density: Tensor, site: dict[str, Any], unit: Sequence[str]) -> Tensor:
    """Sum a site's log-probability down to ``(U,)``; U is the product of the sizes of the unit's plates."""
    frames = {f.name: f for f in site["cond_indep_stack"] if f.vectorized}
    if not unit:
        return density.sum().reshape(1)
    dims = [frames[name].dim for name in unit]
    density = density.reshape((1,) * max(0, -min(dims) - density.dim()) + tuple(density.shape))
    target = list(density.shape)
    for name in unit:
        target[frames[name].dim] = frames[name].size
    density = density.expand(target)
    others = [d for d in range(density.dim()) if d - density.dim() not in dims]
    return (density.sum(others) if others else density).reshape(-1)


def collect(
    drawn: Trace,
    guide: Trace,
    model: Trace,
    structure: Structure,
    scaling: Scaling,
    analytic: Collection[str],
    zero: Tensor,
) -> Terms:
    """Terms of one draw.

    Args:
        drawn: guide trace of the draw, with log-probabilities where there are score sites.
        guide: guide trace whose densities count.
        model: model trace replayed on the draw.
        structure: units, and which sites belong to them.
        scaling: minibatch scales.
        analytic: latent sites whose KL is taken in closed form.
        zero: ``(1,)``, of the right type and device.
    """
    unit = structure.unit

    def per_unit(site: dict[str, Any], density: Tensor) -> Tensor:
        outer = [f for f in site["cond_indep_stack"] if f.vectorized and f.name not in unit]
        return fold(density * math.prod(scaling.factor(f) for f in outer), site, unit)

    in_unit = {s.name for s in (*structure.latents, *structure.observed) if s.in_unit}
    prior, likelihood, log_q, score, free = zero, zero, zero, zero, zero.sum()
    summed = sums(model, scaling.scale_of, scaling.factor)
    for one in summed:
        prior = prior + per_unit(one.around, one.log_prior * one.scale)
        likelihood = likelihood + per_unit(one.around, one.log_likelihood * one.scale)
    for site in apart(model, summed):
        name, observed = site["name"], site["is_observed"]
        if name in analytic:
            prior = prior - per_unit(site, analytic_kl(guide.nodes[name], site))
        elif not observed:
            prior = prior + per_unit(site, density_of(site, scaling))
        elif name in in_unit:
            likelihood = likelihood + per_unit(site, density_of(site, scaling))
        else:
            whole = math.prod(scaling.factor(f) for f in site["cond_indep_stack"])
            free = free + density_of(site, scaling).sum() * whole
    for site in random_sites(guide):
        if site["name"] not in analytic:
            log_q = log_q + per_unit(site, density_of(site, scaling))
    for name in structure.score_sites:
        score = score + per_unit(drawn.nodes[name], density_of(drawn.nodes[name], scaling))
    weight = torch.ones_like(zero)
    for site in random_sites(drawn):
        if strata_of(site) > 1:
            weight = innermost(site["fn"]).stratum_weight.reshape(-1)
    size = torch.zeros_like(prior + likelihood + log_q)
    return Terms(prior + likelihood, log_q + size, prior + size, free, score + size, weight)


def analytic_kl(guide_site: dict[str, Any], model_site: dict[str, Any]) -> Tensor:
    """KL(guide || prior) of a site by batch dimension, in nats, in closed form.

    Raises:
        NotImplementedError: if torch does not know it.
    """
    kl: Tensor = kl_divergence(guide_site["fn"], model_site["fn"])
    return kl
