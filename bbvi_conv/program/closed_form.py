"""Latent sites whose KL to the prior may be taken in closed form without changing the bound's expectation."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from bbvi_conv.program.enumeration import joined
from bbvi_conv.program.program import Program
from bbvi_conv.program.structure import as_leaf, latent_sites, random_sites, revalued
from bbvi_conv.program.terms import analytic_kl


def closed_form_sites(program: Program) -> tuple[str, ...]:
    """Latent sites whose guide and prior depend on no latent, are neither scaled nor masked, and have a known KL.

    For such a site :math:`E_q[\\log p(z) - \\log q(z)] = -KL(q \\| p)` whatever the other sites do. Dependence is read
    from the autograd graph; what depends on an enumerated latent is summed with it.

    Raises:
        ValueError: if there is no such site.
    """
    _, batch = program.example()
    args = program.positional(batch)
    with program.networks_kept(), program.handlers(None, batch):
        drawn = revalued(poutine.trace(program.guide).get_trace(*args, **program.kwargs), as_leaf)
        leaves = [s["value"] for s in random_sites(drawn) if not s["is_observed"] and s["value"].requires_grad]
        guide = poutine.trace(poutine.replay(program.guide, trace=drawn)).get_trace(*args, **program.kwargs)
        model = poutine.trace(poutine.replay(program.density_model, trace=drawn)).get_trace(*args, **program.kwargs)
        model.compute_log_prob()
        summed = joined(model)
        found = [
            site["name"]
            for site in latent_sites(model)
            if site["name"] not in summed and _qualifies(program, guide.nodes[site["name"]], site, leaves)
        ]
    if not found:
        raise ValueError(
            "no site has an analytic KL: it needs a guide of your own with a distribution at that site (families and "
            "AutoGuides draw all latents as one vector) and a prior that depend on no other latent, unscaled and "
            "unmasked, with a KL that torch knows; leave analytic_kl=False"
        )
    return tuple(found)


def _qualifies(program: Program, guide: dict[str, Any], model: dict[str, Any], leaves: list[Tensor]) -> bool:
    if isinstance(guide["fn"], dist.Delta) or not model["value"].is_floating_point():
        return False
    for site in (guide, model):
        plate_scale = 1.0
        for frame in site["cond_indep_stack"]:
            plate_scale *= (frame.full_size or frame.size) / frame.size if frame.vectorized else 1.0
        if site["mask"] is not None or float(torch.as_tensor(site["scale"])) != plate_scale:
            return False
        density = site["fn"].log_prob(model["value"].detach()).sum()
        if density.requires_grad:
            grads = torch.autograd.grad(density, leaves, allow_unused=True)
            if any(g is not None for g in grads):
                return False
    try:
        analytic_kl(guide, model)
    except NotImplementedError:
        return False
    return True
