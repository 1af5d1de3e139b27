"""What one eager pass tells about a model and guide: sites, plates, leaves, units; and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.distributions import Delta, GaussianMRF
from pyro.distributions.hmm import HiddenMarkovModel
from pyro.distributions.util import broadcast_shape  # torch's own imports a computer algebra system, half a second
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import TransformedDistribution, biject_to, constraints

Group = Literal["theta", "phi", "shared"]


@dataclass(frozen=True)
class Leaf:
    """An unconstrained parameter: the tensor that Pyro or a module owns, its constraint and its group."""

    name: str
    tensor: Tensor
    constraint: Any
    group: Group


@dataclass(frozen=True)
class Site:
    """A random site: plates outermost first, as ``(name, dim, size)``."""

    name: str
    plates: tuple[tuple[str, int, int], ...]
    observed: bool
    in_unit: bool
    event_dim: int
    size: int


@dataclass(frozen=True)
class Structure:
    """Sites of model and guide, and the conditionally independent unit.

    Attributes:
        latents: latent sites of the model.
        enumerated: discrete latent sites of the model that the guide leaves out; they are summed out of its density.
        observed: observed sites of the model (factors included, deterministic sites not).
        auxiliary: sites of the guide alone.
        score_sites: guide sites without a pathwise gradient.
        no_path: guide sites whose density is known at their own draws only.
        strata: components of a stratified mixture in the guide, every one of which each evaluation draws; else 1.
        unit: plates shared by all latent sites and every site that depends on a latent, outermost first.
        unit_shape: their sizes.
    """

    latents: tuple[Site, ...]
    enumerated: tuple[Site, ...]
    observed: tuple[Site, ...]
    auxiliary: tuple[Site, ...]
    score_sites: tuple[str, ...]
    no_path: tuple[str, ...]
    strata: int
    unit: tuple[str, ...]
    unit_dims: tuple[int, ...]
    unit_shape: tuple[int, ...]

    def describe(self) -> str:
        """The unit in words, as shown to the user."""
        if not self.unit:
            return "one unit: the joint bound of all latent sites"
        sized = min(self.unit_shape) >= 0  # a plate may be written without a size
        units = f"{math.prod(self.unit_shape)} units: one" if sized else "one unit"
        return f"{units} per index of plate {' x '.join(self.unit)}"


def is_plate(site: dict[str, Any]) -> bool:
    """Whether a trace node is the subsample statement of a plate."""
    return site["type"] == "sample" and isinstance(site["fn"], _Subsample)


def innermost(fn: Any) -> Any:
    """The distribution inside ``Independent`` and other wrappers."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def is_of_any_length(fn: Any) -> bool:
    """Whether a chain of hidden states, alike at all times, is that of as many times as there are data."""
    inner = innermost(fn)
    alike = isinstance(inner, HiddenMarkovModel | GaussianMRF) and inner.event_shape[0] == 1
    return alike and getattr(inner, "duration", None) is None


def is_deterministic(site: dict[str, Any]) -> bool:
    """Whether a trace node is a ``pyro.deterministic`` statement, or a latent that is computed from others.

    As such ``poutine.reparam`` leaves a site: observed, a point mass that does not count.
    """
    fn, counts = site["fn"], True
    while hasattr(fn, "base_dist"):
        fn, counts = fn.base_dist, counts and getattr(fn, "_mask", None) is not False
    reparametrised = site["is_observed"] and not counts and isinstance(fn, Delta)
    return bool(site["infer"].get("_deterministic")) or reparametrised


def random_sites(trace: Trace) -> list[dict[str, Any]]:
    """Sample sites that carry density: neither plates nor deterministic values."""
    return [s for s in trace.nodes.values() if s["type"] == "sample" and not is_plate(s) and not is_deterministic(s)]


def is_enumerated(site: dict[str, Any]) -> bool:
    """Whether a site of a model's trace holds all values of a discrete latent at once, to be summed out."""
    return site["infer"].get("_enumerate_dim") is not None


def latent_sites(trace: Trace) -> list[dict[str, Any]]:
    """Latent sites of a model's trace that a guide draws."""
    return [s for s in random_sites(trace) if not s["is_observed"] and not is_enumerated(s)]


def strata_of(site: dict[str, Any]) -> int:
    """Components of a stratified mixture at a guide site, else 1; as its distribution declares."""
    return int(getattr(innermost(site["fn"]), "strata", 1))


def revalued(trace: Trace, change: Callable[[Tensor], Tensor]) -> Trace:
    """A trace of its own with the values of random sites changed; Pyro's ``copy`` would share the sites themselves."""
    other = trace.copy()
    for site in random_sites(trace):
        other.nodes[site["name"]] = {**site, "value": change(site["value"])}
    return other


def as_leaf(value: Tensor) -> Tensor:
    """The value as a leaf of the autograd graph, where it is continuous."""
    return value.detach().clone().requires_grad_() if value.is_floating_point() else value


def plates_of(site: dict[str, Any]) -> tuple[tuple[str, int, int], ...]:
    """Vectorized plates around a site, outermost first."""
    frames = [f for f in site["cond_indep_stack"] if f.vectorized]
    return tuple((f.name, f.dim, f.size) for f in sorted(frames, key=lambda f: f.dim))


def subsampling(frame: Any) -> float:
    """N/B of a plate that takes B of its N rows, by which Pyro scales what lies in it; else 1."""
    return float((frame.full_size or frame.size) / frame.size)


def analyse(guide_trace: Trace, model_trace: Trace, dependent: set[str]) -> Structure:
    """Structure of a validated pair of traces; ``dependent`` names the observed sites that depend on a latent."""
    model_sites, guide_sites = random_sites(model_trace), random_sites(guide_trace)
    latent_names = {s["name"] for s in latent_sites(model_trace)}
    relevant = [s for s in model_sites if not s["is_observed"] or s["name"] in dependent]
    relevant += [s for s in guide_sites if not s["is_observed"] or s["name"] not in latent_names]
    common = [set(plates_of(s)) for s in relevant]
    unit = sorted(set.intersection(*common), key=lambda p: p[1]) if common else []

    def describe(s: dict[str, Any]) -> Site:
        in_unit = not s["is_observed"] or s["name"] in dependent
        value = s["value"]
        return Site(
            s["name"],
            plates_of(s),
            bool(s["is_observed"]),
            in_unit,
            int(s["fn"].event_dim),
            int(torch.as_tensor(value).numel()),
        )

    return Structure(
        latents=tuple(describe(s) for s in latent_sites(model_trace)),
        enumerated=tuple(describe(s) for s in model_sites if is_enumerated(s)),
        observed=tuple(describe(s) for s in model_sites if s["is_observed"]),
        auxiliary=tuple(describe(s) for s in guide_sites if s["name"] not in latent_names),
        score_sites=tuple(
            s["name"] for s in guide_sites if not s["is_observed"] and not getattr(s["fn"], "has_rsample", True)
        ),
        no_path=tuple(s["name"] for s in guide_sites if not getattr(innermost(s["fn"]), "path_log_q", True)),
        strata=max((strata_of(s) for s in guide_sites), default=1),
        unit=tuple(name for name, _, _ in unit),
        unit_dims=tuple(dim for _, dim, _ in unit),
        unit_shape=tuple(size for _, _, size in unit),
    )


def not_finite(values: Iterable[tuple[str, Any]]) -> str:
    """What to say of data with NaN or infinities, of each with the first index; nothing where there are none.

    Raises:
        ValueError: for a sparse tensor, which models' densities cannot be taken of.
    """
    found = []
    for name, value in values:
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            raise ValueError(f"{name} is a sparse tensor, which cannot be fitted: hand over its .to_dense()")
        if isinstance(value, Tensor) and value.is_floating_point():
            bad = ~torch.isfinite(value)
            if bad.any():
                index = tuple(int(i) for i in bad.nonzero()[0])
                found.append(f"{name} holds {value[index].item()} at index {index}")
    return f"{' and '.join(found)}; remove such rows, or mask them and put a number in its place" if found else ""


def discrete_latent(name: str, *, made: bool = False) -> str:
    """What to say of a discrete latent site that no guide draws and that cannot be enumerated, or is not for a guide
    that was ``made`` from the model with it."""
    if made:
        return (
            f"latent site {name!r} is discrete: make the guide from the model without it, as "
            f"AutoNormal(poutine.block(model, hide=[{name!r}])), or give a family in its place; it is then summed out "
            "where its values can be listed"
        )
    return (
        f"latent site {name!r} is discrete, and its values cannot be listed: sum it out in the model, by a mixture "
        "distribution or logsumexp, put the entries of a vector in a plate instead of .to_event(), or write a guide "
        "that draws it, where it gets the score function"
    )


def missing_latent(site: Any) -> str:
    """What to say of a latent site that the guide does not draw and whose values cannot be listed."""
    name = site["name"]
    try:
        discrete = innermost(site["fn"]).support.is_discrete
    except (AttributeError, NotImplementedError):
        discrete = False
    if discrete:
        return discrete_latent(name)
    return f"the guide has no sample site {name!r}, a latent of the model; add it to the guide or observe it"


def no_transform(trace: Trace) -> str:
    """What to say of a latent site whose support no transform maps from the reals; nothing where there is none."""
    for site in latent_sites(trace):
        try:
            biject_to(site["fn"].support)
        except NotImplementedError:
            support = str(site["fn"].support).removesuffix("()")
            return (
                f"latent site {site['name']!r} has support {support}, which no family has a transform onto: write "
                "it by parts, as a covariance matrix by LKJCholesky and scales, or give a guide that draws it"
            )
    return ""


def check_guide(guide_trace: Trace, model_trace: Trace) -> None:
    """Refuse a guide that has a site too many.

    Raises:
        ValueError: naming the site.
    """
    latents = {s["name"] for s in latent_sites(model_trace)}
    for name, site in ((s["name"], s) for s in random_sites(guide_trace) if not s["is_observed"]):
        if name not in latents and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"guide site {name!r} is no latent of the model; "
                'remove it, or mark it infer={"is_auxiliary": True} if it only helps the guide'
            )


def outside(site: Any) -> str:
    """The support of a site's distribution in words, where a value that counts lies outside; else empty."""
    fn, value, mask = site["fn"], site["value"], site.get("mask")
    try:
        support = fn.support
        inside = support.check(value)
    except NotImplementedError:
        return ""
    if rest := len(fn.event_shape) - support.event_dim:  # a factor's value is an empty vector, its support of a number
        inside = inside.flatten(-rest).all(-1)
    if isinstance(mask, Tensor):
        inside = inside | ~mask
    return "" if mask is False or bool(torch.as_tensor(inside).all()) else str(support)


def leaves_support(site: Any) -> str:
    """As :func:`outside`, of supports by bounds, those of what a transform makes the value of among them.

    Torch gives transformed distributions the whole range of the transform, whatever goes into it. Values that rounding
    has put at a bound, or off a simplex, are none.
    """
    if site.get("mask") is not None:
        return ""
    fn, value = site["fn"], site["value"]
    try:
        while hasattr(fn, "base_dist"):
            if isinstance(fn, TransformedDistribution):
                for transform in reversed(fn.transforms):
                    value = transform.inv(value)
            fn = fn.base_dist
        support = fn.support
    except (NotImplementedError, KeyError):  # a transform that knows no inverse
        return ""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    slack = 1e-3 * (1 + value.abs())
    for name, sign in (("lower_bound", 1.0), ("upper_bound", -1.0)):
        bound = getattr(support, name, None)
        if isinstance(bound, Tensor) and bound.dim() and site["fn"].event_shape:
            continue  # of an event as a whole
        if bound is not None and not bool((sign * (value - bound) >= -slack).all()):
            return str(support)
    return ""


def check_site(site: Any) -> None:
    """Refuse a value of another shape than its site's, or outside the site's support.

    Raises:
        ValueError: naming the site.
    """
    fn, value = site["fn"], site["value"]
    who = f"{'observed' if site['is_observed'] else 'latent'} site {site['name']!r}"
    if not isinstance(value, Tensor):
        raise ValueError(f"{who} has a value of type {type(value).__name__}: give a tensor, as by torch.as_tensor")
    event = tuple(fn.event_shape)
    if is_of_any_length(fn) and value.dim() >= len(event):
        time = len(event) - len(innermost(fn).event_shape)
        event = (*event[:time], value.shape[time - len(event)], *event[time + 1 :])
    if event and tuple(value.shape[len(value.shape) - len(event) :]) != event:
        raise ValueError(f"{who} expects event shape {event}, got a value of shape {tuple(value.shape)}")
    if not site["is_observed"] and tuple(value.shape) != tuple(fn.shape()):
        raise ValueError(
            f"{who} has shape {tuple(fn.shape())} in the model, but the guide draws shape {tuple(value.shape)}; "
            "check its plates and .to_event()"
        )
    batch = value.shape[: value.dim() - len(event)]
    try:
        together = broadcast_shape(fn.batch_shape, batch)
    except ValueError:
        raise ValueError(
            f"{who} has batch shape {tuple(fn.batch_shape)}, got a value of shape {tuple(value.shape)}; "
            "check the plate sizes and the data"
        ) from None
    plates = plates_of(site)
    sizes = {dim: size for _, dim, size in plates if size >= 0}
    outermost = min((dim for _, dim, _ in plates), default=-len(together))
    sizes |= dict.fromkeys(range(-len(together), outermost), 1)  # of dimensions beside a plate Pyro asks nothing
    wider = any(together[dim] != size for dim, size in sizes.items() if dim >= -len(together))
    if wider or math.prod(together) > max(math.prod(fn.batch_shape), math.prod(batch)):
        lie = ", ".join(f"{name} of {size}" for name, _, size in plates)
        raise ValueError(
            f"{who} has densities of shape {tuple(together)}{f', and lies in plate {lie}' if lie else ''}: a value of "
            f"shape {tuple(value.shape)} meets a distribution of batch shape {tuple(fn.batch_shape)}, and every number "
            "of the one would be scored with every of the other; give both one shape, as by y.squeeze(-1) for a "
            "column, and make further dimensions .to_event()"
        )
    if site["is_observed"] and (told := not_finite([(f"the data of {who}", value.detach())])):
        raise ValueError(told)
    check_support(site)


def check_support(site: Any) -> None:
    """Refuse a value outside the site's support.

    Raises:
        ValueError: naming the site.
    """
    if support := outside(site):
        kind, hint = ("observed", "the data") if site["is_observed"] else ("latent", "the guide's support")
        raise ValueError(f"a value of {kind} site {site['name']!r} lies outside the support {support}; check {hint}")
