"""What a model makes of its latents: the KL that each coordinate carries, and which of them are active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Independent

from bbvi_conv.evaluate.subject import Source, Subject, subject
from bbvi_conv.objectives.checks import check_count
from bbvi_conv.posterior.sites import replay
from bbvi_conv.program.device import cpu_by_default
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise, generator

STREAM = "latents"
ACTIVE = 0.01
"""Variance over data of a coordinate's posterior mean from which it counts as active."""


@dataclass(frozen=True)
class Latents:
    r"""The use made of the coordinates of every latent site.

    Attributes:
        kl: site -> ``(d,)``, :math:`E_x E_q[\log q(z_j | \cdot) - \log p(z_j | \cdot)]` in nats per datum; over all
            sites and coordinates their sum is the KL term of the ELBO.
        kl_errors: site -> ``(d,)``, standard errors over data.
        activity: site -> ``(d,)``, :math:`\operatorname{Var}_x E[z_j | x]`, unbiased.
        threshold: from which activity on a coordinate is active.
    """

    kl: dict[str, Tensor]
    kl_errors: dict[str, Tensor]
    activity: dict[str, Tensor]
    threshold: float = ACTIVE

    @property
    def active(self) -> dict[str, int]:
        """Active coordinates of each site."""
        return {name: int((value > self.threshold).sum()) for name, value in self.activity.items()}


@cpu_by_default
def latents(
    source: Source,
    data: Any = None,
    *,
    num_samples: int = 8,
    threshold: float = ACTIVE,
    batch: int = 100,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Latents:
    """KL and activity of every coordinate of every latent, where prior and guide are products over coordinates.

    Args:
        source, data, batch, seed, dtype: as for :func:`~bbvi_conv.evaluate.importance.log_likelihood`.
        num_samples: S, draws per datum, at least 2: activity is the covariance of means over two halves of them, which
            has no bias from their noise.
        threshold: of :class:`Latents`.

    Raises:
        TypeError: a source that is neither a fit nor a pair.
        ValueError: fewer than two samples, or a site whose law does not factorise.

    Reference: Burda et al. (2016), section 5.2, https://arxiv.org/abs/1509.00519
    """
    check_count("num_samples", num_samples)
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2 to tell activity from noise, got {num_samples}")
    found = subject(source, data, batch=batch, dtype=dtype)
    kept: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for index, (part, counted) in enumerate(found.parts()):
        gen = generator(seed, STREAM, index, found.program.device)
        noise = found.program.layout.draw(gen, num_samples, dtype=found.program.dtype)
        for name, (kl, mean) in _of_part(found, noise, part).items():
            half = num_samples // 2
            pieces = kl.mean(0), mean[:half].mean(0), mean[half:].mean(0)
            kept.setdefault(name, []).append(tuple(piece[:counted] for piece in pieces))  # type: ignore[arg-type]
    joined = {name: [torch.cat(column) for column in zip(*parts, strict=True)] for name, parts in kept.items()}
    rows = found.total
    return Latents(
        {name: kl.mean(0) for name, (kl, _, _) in joined.items()},
        {name: kl.std(0) / rows**0.5 for name, (kl, _, _) in joined.items()},
        {n: ((a - a.mean(0)) * (b - b.mean(0))).sum(0) / (rows - 1) for n, (_, a, b) in joined.items()},
        threshold,
    )


def _of_part(found: Subject, noise: Noise, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Per site: log q - log p and conditional means, each ``(S, B, d)`` in float64."""
    program, names = found.program, [site.name for site in found.program.structure.latents]
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}
    with torch.no_grad(), program.networks_kept():
        for draw in range(len(noise.normal)):
            guide = program.drawn(found.x, noise.at(draw), batch)
            values = {name: guide.nodes[name]["value"] for name in names}
            model = replay(program, found.x, values, batch)
            for name in names:
                q, p = (_coordinates(trace.nodes[name]["fn"], name) for trace in (guide, model))
                shape = values[name].reshape(len(values[name]), -1).shape
                ratio = q.log_prob(values[name]) - p.log_prob(values[name])
                seen[name][0].append(ratio.expand_as(values[name]).reshape(shape).double())
                seen[name][1].append(q.mean.expand_as(values[name]).reshape(shape).double())
    return {name: (torch.stack(kl), torch.stack(mean)) for name, (kl, mean) in seen.items()}


def _coordinates(fn: Any, name: str) -> Any:
    """The law of single coordinates."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if isinstance(fn, Delta) or fn.event_shape:
        raise ValueError(
            f"the law of site {name!r} is no product over coordinates, so its KL is not a sum over them; "
            "write the guide with dist.Normal(loc, scale).to_event(1)"
        )
    return fn
