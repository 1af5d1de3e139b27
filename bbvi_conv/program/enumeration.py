"""Discrete latents that no guide draws: enumerated in the model, and summed out of its density by Pyro's algebra."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bbvi_conv.program.elimination import InOrder
from bbvi_conv.program.structure import is_enumerated, missing_latent, random_sites


class Enumerated:
    """A model whose named discrete latents take all their values at once, each along a dimension of its own.

    Args:
        model: the model.
        names: sites to enumerate, whether or not the model marks them ``infer={"enumerate": "parallel"}``.
        dim: the first dimension, counted from the right, that no plate and no batch of the model uses.
    """

    def __init__(self, model: Callable[..., Any], names: Collection[str], dim: int) -> None:
        self.names, self.dim = frozenset(names), dim
        self._run = poutine.enum(self.marked(model), first_available_dim=dim)

    def marked(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The model with these sites, and no others, marked for enumeration."""

        def mark(site: Any) -> dict[str, Any]:
            return {"enumerate": "parallel" if site["name"] in self.names else None, "num_samples": None}

        marked: Callable[..., Any] = poutine.infer_config(model, mark)
        return marked

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def refused(self, error: Exception) -> ValueError:
        """What to say of an error that the model raises although it ran with single values."""
        why = str(error).splitlines()[0].rstrip(".")
        return ValueError(_no_enumeration(sorted(self.names), f"the model does not stand that ({why})"))


def _no_enumeration(names: Iterable[str], what: str) -> str:
    return (
        f"discrete latent {', '.join(map(repr, names))} is in no guide, so that its values are all tried at once, and "
        f"{what}: what follows from them must be computed entry by entry along their plates, with no sums over these, "
        "no if, z[..., None] where z meets a vector, and Vindex(a)[..., z] for a[..., z] (see Pyro's guide to "
        "enumeration); or draw it in a guide, where it gets the score function"
    )


def is_enumerable(site: Any) -> bool:
    """Whether a site is a discrete latent whose values can be listed."""
    if site["is_observed"] or not getattr(site["fn"], "has_enumerate_support", False):
        return False
    try:
        site["fn"].enumerate_support(expand=False)
    except NotImplementedError:
        return False
    return True


def enumerated(model: Callable[..., Any], trace: Trace, drawn: Collection[str]) -> Enumerated | None:
    """The model with what a guide leaves out enumerated; None where it leaves nothing out.

    Args:
        model: the model.
        trace: of one run of it, as it is.
        drawn: latent sites that the guide draws.

    Raises:
        ValueError: naming a site left out whose values cannot be listed.
    """
    sites = random_sites(trace)
    left = [s for s in sites if not s["is_observed"] and s["name"] not in drawn]
    if not left:
        return None
    for site in left:
        if not is_enumerable(site):
            raise ValueError(missing_latent(site))
    used = [len(s["fn"].batch_shape) for s in sites]
    used += [-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized]
    return Enumerated(model, [s["name"] for s in left], -1 - max(used))


def without_discrete(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model as a family of guides shall see it: without the latents that can be enumerated."""
    blocked: Callable[..., Any] = poutine.block(
        model, hide_fn=lambda site: site["type"] == "sample" and is_enumerable(site)
    )
    return blocked


def check_enumerated(trace: Trace, plain: Trace, run: Callable[[dict[str, Tensor]], Trace]) -> None:
    """Compare densities at some values of the enumerated sites with those of runs that hold these values alone.

    Args:
        trace: of an :class:`Enumerated` model, log-probabilities computed.
        plain: of a run of the model as it is.
        run: the model as it is with the enumerated sites at given values, by name.

    Raises:
        ValueError: naming the site that is not computed entry by entry from an enumerated one.
    """
    sites = [s for s in random_sites(trace) if is_enumerated(s)]
    supports = {s["name"]: s["value"].reshape(-1, *s["fn"].event_shape) for s in sites}
    shapes = {name: plain.nodes[name]["fn"].batch_shape for name in supports}
    factors = [_factor(trace, site, site["unscaled_log_prob"]) for site in random_sites(trace)]
    for pick in (lambda at, size: 0 * at, lambda at, size: 0 * at + size - 1, torch.remainder):
        places = {
            name: pick(torch.arange(shape.numel(), device=supports[name].device), len(supports[name])).reshape(shape)
            for name, shape in shapes.items()
        }
        seen = run({name: supports[name][place] for name, place in places.items()})
        seen.compute_log_prob()
        for factor in factors:
            name = factor.site["name"]
            density: Any = factor.density
            for site in sites:
                symbol = site["infer"]["_enumerate_symbol"]
                if symbol in factor.enumerated:
                    place = packed.pack(places[site["name"]], site["infer"]["_dim_to_symbol"])
                    density = packed.gather(density, place, symbol)
            found = packed.unpack(density, trace.symbol_to_dim).squeeze()
            right = seen.nodes[name]["unscaled_log_prob"].squeeze()
            alone = set(density._pyro_dims) - _ordinal(trace, factor.site)  # plates of an enumerated site, not its own
            if alone or found.shape != right.shape or not torch.allclose(found, right, 1e-3, 1e-4, equal_nan=True):
                raise ValueError(_no_enumeration(supports, f"site {name!r} does not stand that"))


class Sum(NamedTuple):
    """What one connected set of enumerated sites leaves behind, summed over all their values.

    Attributes:
        frames: plates that all sites of the set share; the densities are laid out along these.
        sites: the enumerated sites and all that depend on them.
        observed: those of them that are observed.
        log_prior: log density of the latents among the sites that are not enumerated, nats, unscaled.
        log_likelihood: log density of the observed sites given these, nats, unscaled.
        scale: of ``poutine.scale``, which all its sites share.
    """

    frames: tuple[Any, ...]
    sites: tuple[str, ...]
    observed: tuple[str, ...]
    log_prior: Tensor
    log_likelihood: Tensor
    scale: Any

    @property
    def density(self) -> Tensor:
        """Log density of all sites, scaled."""
        density: Tensor = (self.log_prior + self.log_likelihood) * self.scale
        return density

    @property
    def around(self) -> dict[str, Any]:
        """The plates as a site of a trace has them."""
        return {"cond_indep_stack": self.frames}

    @property
    def name(self) -> str:
        """What the observed sites are called together."""
        return "+".join(self.observed if len(self.observed) < 4 else (self.observed[0], "...", self.observed[-1]))


def sums(
    trace: Trace, scale: Callable[[dict[str, Any]], Any], factor: Callable[[Any], float] = lambda frame: 1.0
) -> list[Sum]:
    r"""Sum the enumerated sites of a trace out of its density: :math:`\log \sum_z p(z, x \mid \theta)`.

    Sites that no value of an enumerated site reaches are in no sum. A masked enumerated site counts as uniform, so that
    masked entries leave the density as it is.

    Args:
        trace: of an :class:`Enumerated` model, log-probabilities computed.
        scale: scale of a site, minibatch scales out.
        factor: N/B of a plate.

    Raises:
        ValueError: where sites of one sum differ in scale, where one sum holds rows of a subsampled plate, or where
            plates are so nested that no algebra of factors can sum the sites.
    """
    return [_summed(trace, group, scale, factor) for group in _connected(trace)]


class _Factor(NamedTuple):
    """A site's log-probability with a symbol for each dimension, and which of these are enumerated."""

    site: dict[str, Any]
    density: Tensor
    enumerated: frozenset[str]


def _connected(trace: Trace) -> list[list[_Factor]]:
    """Factors that enumerated sites join, in the order of the trace."""
    if not any(map(is_enumerated, random_sites(trace))):
        return []
    groups: list[list[_Factor]] = []
    for site in random_sites(trace):
        factor = _factor(trace, site, _masked(site))
        if not factor.enumerated and not is_enumerated(site):
            continue
        joined = [g for g in groups if any(factor.enumerated & other.enumerated for other in g)]
        merged = [*(other for g in joined for other in g), factor]
        groups = [*(g for g in groups if not any(g is j for j in joined)), merged]
    return groups


def _masked(site: dict[str, Any]) -> Tensor:
    density, mask = site["unscaled_log_prob"], site["mask"]
    if mask is None or not is_enumerated(site):
        masked: Tensor = scale_and_mask(density, 1.0, mask)
        return masked
    uniform = -math.log(len(site["value"].reshape(-1, *site["fn"].event_shape)))
    return torch.where(torch.as_tensor(mask, device=density.device), density, uniform)


def _factor(trace: Trace, site: dict[str, Any], density: Tensor) -> _Factor:
    """A density of a site with the dimensions that Pyro gave their symbols."""
    if not hasattr(trace, "symbol_to_dim"):
        trace.symbolize_dims()
    try:
        named = packed.pack(density, site["infer"]["_dim_to_symbol"])
    except ValueError:
        raise ValueError(
            f"site {site['name']!r} has a log-probability of shape {tuple(density.shape)}, with a dimension that is "
            "neither a plate's nor an enumerated site's: put its batch dimensions in plates, or make them .to_event()"
        ) from None
    return _Factor(site, named, frozenset(named._pyro_dims) - set(trace.plate_to_symbol.values()))


def _summed(
    trace: Trace, group: list[_Factor], scale: Callable[[dict[str, Any]], Any], factor: Callable[[Any], float]
) -> Sum:
    names = tuple(f.site["name"] for f in group)
    enumerates = ", ".join(repr(f.site["name"]) for f in group if is_enumerated(f.site))
    scales = [scale(f.site) for f in group]
    if any(s is not scales[0] and (isinstance(s, Tensor) or s != scales[0]) for s in scales):
        raise ValueError(f"discrete latent {enumerates} is summed out, so that sites {', '.join(names)} need one scale")
    shared = frozenset.intersection(*(_ordinal(trace, f.site) for f in group))
    stacks = [f for one in group for f in one.site["cond_indep_stack"] if f.vectorized]
    frames = {trace.plate_to_symbol[f.name]: f for f in stacks}
    for symbol, frame in frames.items():
        if symbol not in shared and factor(frame) != 1.0:
            raise ValueError(
                f"discrete latent {enumerates} is shared by rows of plate {frame.name!r}, which is subsampled: its sum "
                "needs all rows; leave out the minibatch, or draw the latent in a guide, by the score function"
            )

    def total(factors: list[_Factor]) -> Tensor:
        tree: OrderedDict[Any, list[Tensor]] = OrderedDict()
        for f in factors:
            tree.setdefault(_ordinal(trace, f.site), []).append(f.density)
        dims = set().union(*(f.enumerated for f in factors))
        ring = InOrder(dim_to_size={symbol: frame.size for symbol, frame in frames.items()})
        try:
            found = contract_to_tensor(tree, dims, target_ordinal=shared, ring=ring)
        except NotImplementedError as error:
            raise ValueError(f"discrete latent {enumerates} cannot be summed out: {error}") from error
        unpacked: Tensor = packed.unpack(found, trace.symbol_to_dim)
        return unpacked

    latent = [f for f in group if not f.site["is_observed"]]
    whole = total(group)
    prior = total(latent) if any(not is_enumerated(f.site) for f in latent) else torch.zeros_like(whole)
    observed = tuple(f.site["name"] for f in group if f.site["is_observed"])
    around = tuple(frame for symbol, frame in frames.items() if symbol in shared)
    return Sum(around, names, observed, prior, whole - prior, scales[0])


def _ordinal(trace: Trace, site: dict[str, Any]) -> frozenset[str]:
    return frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)


def joined(trace: Trace) -> set[str]:
    """Names of the enumerated sites and of all sites that depend on them."""
    return {factor.site["name"] for group in _connected(trace) for factor in group}


def log_joint(trace: Trace) -> Tensor:
    """Log density of a trace in nats, ``()``, all scales in, enumerated sites summed out."""
    summed = sums(trace, lambda site: site["scale"])
    parts = [site["log_prob"] for site in apart(trace, summed)] + [one.density for one in summed]
    return torch.stack([part.sum() for part in parts]).sum()


def apart(trace: Trace, summed: Collection[Sum]) -> Iterator[dict[str, Any]]:
    """Random sites of a trace that are in none of its sums."""
    inside = {name for one in summed for name in one.sites}
    return (site for site in random_sites(trace) if site["name"] not in inside)
