"""What the sites of a model look like from outside: their plates, their shapes, and the model run at given latents."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer import infer_discrete
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import random_state
from bbvi_conv.program.program import Program, Rows, SiteValues, quiet_pyro
from bbvi_conv.program.structure import innermost, is_deterministic, is_of_any_length, is_plate, plates_of

Plates = tuple[tuple[str, int, int], ...]


class Variable(NamedTuple):
    """A site of the model, or several that have one log-likelihood together.

    Attributes:
        kind: ``latent``, ``deterministic``, ``observed``, ``factor`` or ``together``.
        plates: ``(name, dim, size)``, outermost first; ``dim`` counts from the right of the batch shape.
        event_dim: dimensions right of the batch shape.
        shape: of its value.
        scaled: whether ``poutine.scale`` or a mask changes its density.
        silent: why no value can be drawn from its distribution; empty where one can.
    """

    name: str
    kind: str
    plates: Plates
    event_dim: int
    shape: tuple[int, ...]
    scaled: bool
    silent: str

    @property
    def numel(self) -> int:
        """Numbers in one value."""
        return torch.Size(self.shape).numel()

    def inside(self, plate: str | None) -> bool:
        """Whether the site lies in the plate."""
        return any(name == plate for name, _, _ in self.plates)

    def axis(self, plate: str | None) -> int | None:
        """Dimension of the value, from the right, that runs over the plate."""
        dims = [dim - self.event_dim for name, dim, _ in self.plates if name == plate]
        return dims[0] if dims and len(self.shape) >= -dims[0] else None


def variable(sites: Mapping[str, Variable], group: str, name: str) -> Variable:
    """What is known of a name in a group of arrays: there it may stand for several sites together."""
    return sites.get(f"{group}:{name}") or sites[name]


class Unobserved(Messenger):  # type: ignore[misc]
    """Sample the named observed sites afresh and keep the data of all others."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and msg["is_observed"]:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


class Places(Messenger):  # type: ignore[misc]
    """Enumerated sites whose values are no single numbers give their places in the list of values to all around.

    What draws enumerated sites together, Pyro's, picks single numbers only. The model gets the values.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)
        self._laws: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        law = msg["fn"]
        if msg["name"] in self.names and law.event_dim:
            self._laws[msg["name"]] = law
            msg["fn"] = dist.Categorical(logits=law.log_prob(law.enumerate_support(expand=False)).movedim(0, -1))

    def _pyro_post_sample(self, msg: Any) -> None:
        self._value(msg["name"], msg)

    def _value(self, name: str, site: Any) -> None:
        if name in self._laws:
            law = site["fn"] = self._laws[name]
            listed = law.enumerate_support(expand=False)
            site["value"] = listed.reshape(-1, *law.event_shape)[site["value"]]

    def valued(self, trace: Trace) -> Trace:
        """The trace of what has run inside with values in place of places."""
        for name in self._laws:
            self._value(name, trace.nodes[name])
        return trace


def replay(program: Program, x: Tensor, latents: Mapping[str, Tensor], batch: Batch, free: Sequence[str] = ()) -> Trace:
    """The model's trace at flat parameters ``x`` with the latent sites given and the sites ``free`` sampled afresh.

    Enumerated sites that are not given are drawn from their joint law given the latents and the data, by forward
    filtering and backward sampling.
    """
    bound = program.bind(program.model, x)
    drawn = program.enumerated
    if drawn is not None and latents.keys() >= set(drawn.names):
        drawn = None
    places = Places(() if drawn is None else drawn.names)

    def model(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            if program.plate is not None:
                stack.enter_context(Rows({program.plate: batch.indices}))
            stack.enter_context(poutine.condition(data=dict(latents)))
            stack.enter_context(places)
            return bound(*args, **kwargs)

    if drawn is not None:
        model = infer_discrete(drawn.marked(model), first_available_dim=drawn.dim)
    with quiet_pyro(program.store, program.dtype, program.device), Unobserved(free):
        return places.valued(poutine.trace(model).get_trace(*program.positional(batch), **program.kwargs))


def inspect_sites(
    program: Program, x: Tensor, seen: SiteValues, batch: Batch
) -> tuple[dict[str, Variable], dict[str, Tensor]]:
    """The sites of the model and the data of the observed ones, read off one run; torch's generator stays as found.

    What sites have together is under ``log_likelihood:`` and their name.
    """
    latents = {*seen.latent, *(site.name for site in program.structure.enumerated)}
    with torch.no_grad(), random_state(program.device):
        nodes: dict[str, Any] = dict(replay(program, x, seen.latent, batch).nodes)
        sampled = {name: site for name, site in nodes.items() if site["type"] == "sample" and not is_plate(site)}
        sites = {name: _variable(program, site, name in latents) for name, site in sampled.items()}
    data = {name: nodes[name]["value"].detach() for name, v in sites.items() if v.kind == "observed"}
    for one in seen.sums:
        if any(name in data for name in one.observed):
            scaled = any(sites[name].scaled for name in one.sites)
            shape = tuple(one.log_likelihood.shape)
            whole = Variable(one.name, "together", plates_of(one.around), 0, shape, scaled, "")
            sites[f"log_likelihood:{one.name}"] = whole
    return sites, data


def _variable(program: Program, site: dict[str, Any], latent: bool) -> Variable:
    fn, shape = site["fn"], tuple(site["value"].shape)
    plates, scale = plates_of(site), program.scale_of(site)
    scaled = site["mask"] is not None or not isinstance(scale, float | int) or abs(scale - 1.0) > 1e-12
    if is_deterministic(site):
        event_dim = _event_dim(shape, int(fn.event_dim), plates)
        return Variable(site["name"], "deterministic", plates, event_dim, shape, False, "")
    if isinstance(innermost(fn), Unit):
        return Variable(site["name"], "factor", plates, 1, shape, scaled, "a factor has no distribution to draw from")
    if latent:
        return Variable(site["name"], "latent", plates, int(fn.event_dim), shape, scaled, "")
    return Variable(site["name"], "observed", plates, int(fn.event_dim), shape, scaled, _silent(fn))


def _silent(fn: Any) -> str:
    if is_of_any_length(fn):
        return f"{type(innermost(fn)).__name__} is of no length of its own, as those are that are given duration="
    try:
        fn.sample()
    except NotImplementedError as error:
        return str(error) or f"{type(fn).__name__} has no sample()"
    return ""


def _event_dim(shape: tuple[int, ...], declared: int, plates: Plates) -> int:
    """Event dimensions of a deterministic value: as declared; by default, "all", as many as the plates leave."""
    candidates = [declared] if declared < len(shape) else range(len(shape))
    for event_dim in candidates:
        batch = shape[: len(shape) - event_dim]
        if plates and all(len(batch) >= -dim and batch[dim] == size for _, dim, size in plates):
            return event_dim
    return declared
