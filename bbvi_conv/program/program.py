"""``Program``: a Pyro model and guide as a pure function of parameters, noise and minibatch."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import Distribution, transform_to

from bbvi_conv.program.buffers import CalledModule, buffers_kept, by_name, copies_of, of_modules, restore_buffers
from bbvi_conv.program.device import by_default
from bbvi_conv.program.enumeration import Enumerated, Sum, apart, sums
from bbvi_conv.program.minibatch import Batch, Minibatch
from bbvi_conv.program.noise import ALONE, Noise, NoiseLayout, random_state
from bbvi_conv.program.structure import (
    Leaf,
    Structure,
    is_deterministic,
    is_plate,
    latent_sites,
    leaves_support,
    outside,
    random_sites,
    revalued,
    subsampling,
)
from bbvi_conv.program.tape import Tape, TapeEnds, taped
from bbvi_conv.program.terms import Terms, collect, density_of

Params = dict[str, dict[str, Tensor]]
"""Unconstrained leaves by group: ``{"theta": {name: tensor}, "phi": ..., "shared": ...}``."""

GROUPS = ("theta", "phi", "shared")

NOISY_GUIDE = "the guide draws noise outside its sample sites, as by dropout: its density at given values is unknown"

UNTAPED_SEED = 2
"""Uniforms at the head of the tape that seed the generator of random operations the tape cannot serve."""


class SiteValues(NamedTuple):
    """What one draw looks like to the user: values of sites, log-likelihoods per observation, the two densities.

    Sites that follow from enumerated ones have no log-likelihood of their own, but share that of one of the ``sums``.
    """

    latent: dict[str, Tensor]
    deterministic: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    sums: list[Sum]
    log_p: Tensor
    log_q: Tensor


class ParamValues(Messenger):  # type: ignore[misc]
    """Answer ``pyro.param`` with the tape's values: not everything that is done with a leaf passes by the tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def _pyro_post_param(self, msg: Any) -> None:
        value = self.tape.values.get(id(msg["value"]))
        if value is not None:  # the leaf itself: of a constrained parameter the tape sees the leaf
            value.unconstrained = weakref.ref(value)  # type: ignore[attr-defined]
            msg["value"] = value


class Rows(Messenger):  # type: ignore[misc]
    """Answer subsample statements of plates with given row indices, by name; None: the rows of the batch, in order."""

    def __init__(self, indices: Mapping[str, Tensor | None]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.indices or not is_plate(msg):
            return
        rows = self.indices[msg["name"]]
        if rows is None and msg["value"] is not None:
            return  # plate(..., subsample=x) over the rows themselves
        size = msg["fn"].subsample_size or msg["fn"].size
        msg["value"], msg["done"] = torch.arange(size) if rows is None else rows, True


def _is_of_torch(kind: type) -> bool:
    """Whether a class is one of the layers of ``torch.nn``."""
    return issubclass(kind, nn.Module) and kind is not nn.Module and kind.__module__.startswith("torch.nn.")


def _unchecked(fn: Distribution, value: Tensor) -> None:
    """In place of a distribution's look at a value."""


@contextmanager
def quiet_pyro(
    store: dict[str, Any] | None, dtype: torch.dtype, device: torch.device, *, validate: bool = False
) -> Iterator[None]:
    """Pyro's handlers with a store, default dtype and device, and validation flag of their own; put back at the end.

    Without ``validate`` no value is checked, not even by a distribution made elsewhere with validation on, such as the
    prior of a ``PyroSample``: where a program is traced, a check is control flow that depends on values.
    """
    with ALONE, ExitStack() as stack:
        before = torch.get_default_dtype()
        stack.enter_context(pyro.get_param_store().scope(store))
        stack.enter_context(pyro.validation_enabled(validate))
        if not validate:
            stack.enter_context(mock.patch.object(Distribution, "_validate_sample", _unchecked))
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(dtype)
        stack.enter_context(by_default(device))
        if "torch._dynamo" in sys.modules:  # networks that the user compiled run as they were written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def guide_trace(guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    """Trace of one run of a guide; what a messenger guide observes as it runs the model is not the guide's."""
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    if isinstance(guide, GuideMessenger):
        for site in random_sites(trace):
            if site["is_observed"]:
                trace.remove_node(site["name"])
    return trace


def _bad(site: dict[str, Any]) -> str:
    """What of a site is not finite: its value, or a log-probability that no value outside the support explains."""
    if not bool(torch.isfinite(site["value"]).all()):
        return "value"
    explained = not site["is_observed"] and outside(site)
    return "" if explained or bool(torch.isfinite(site["unscaled_log_prob"]).all()) else "log-probability"


def anew(trace: Trace) -> Trace:
    """The same values as new tensors: a distribution that remembers its own draw must not recognise them.

    The numbers that a straight-through draw was rounded from stay with it.
    """

    def clone(value: Tensor) -> Tensor:
        new = value.clone()
        if hasattr(value, "_unquantize"):
            new._unquantize = value._unquantize  # type: ignore[attr-defined]
        return new

    return revalued(trace, clone)


class Program:
    r"""``log_weights(theta, phi_sample, phi_density, noise, batch) -> Terms`` of one Pyro model and guide.

    The variational parameters enter twice, once through the draw :math:`z = g(\epsilon, \phi, x)` and once through the
    density :math:`\log q_\phi(z)`, so that an estimator is a choice of which copy is detached. Where both are the same
    object, the guide runs once and its density may use the noise of the draw (no inverse, no triangular solve).

    Made by :func:`bbvi_conv.program.build.build`.

    Attributes:
        leaves: unconstrained parameters, theta first, then phi, then shared.
        structure: sites and units.
        density_model: the model whose traces hold the densities: that with its enumerated sites, or itself.
        layout: base noise of one run.
        total: N, rows of the data when a plate is subsampled, else 1.
        scale: N/B, else 1.
        dtype, device: float type of parameters, noise and data, and where they live.
        obstacles: why the program cannot be traced; empty when nothing is known against it.
        untaped: whether a random operation is drawn from a generator seeded by the tape.
        own_rows: plates whose rows the model draws by itself, in a loop of the user's own.
        implicit: whether a draw has an implicit gradient, which has no second derivative.
        component_slots: uniforms by which the guide picks the component of a stratified mixture; empty without.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        store: dict[str, Any],
        leaves: Sequence[Leaf],
        structure: Structure,
        enumerated: Enumerated | None,
        layout: NoiseLayout,
        minibatch: Minibatch | None,
        batched: tuple[int, ...],
        total: int,
        by_index: bool,
        dtype: torch.dtype,
        device: torch.device,
        obstacles: Sequence[str],
        untaped: bool,
        implicit: bool,
        modules: Sequence[nn.Module],
        own_rows: Sequence[str] = (),
        component_slots: slice = slice(0),
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.store, self.structure, self.layout, self.dtype = store, structure, layout, dtype
        self.minibatch, self.batched, self.total, self.by_index = minibatch, batched, total, by_index
        self.obstacles, self.untaped, self.implicit = tuple(obstacles), untaped, implicit
        self.buffers: Sequence[CalledModule] = ()
        self.leaves = tuple(sorted(leaves, key=lambda leaf: GROUPS.index(leaf.group)))
        self.modules, self.own_rows = tuple(modules), tuple(own_rows)
        self.enumerated, self.density_model = enumerated, enumerated or model
        self.analytic: tuple[str, ...] = ()
        self.component_slots = component_slots
        self.scale = total / minibatch.size if minibatch else 1.0
        self.sizes = [leaf.tensor.numel() for leaf in self.leaves]
        self.device = device

    @property
    def layered(self) -> bool:
        """Whether a leaf is a matrix of a layer of ``torch.nn``: steps on what acts through layers have to be small."""
        trained = {id(leaf.tensor) for leaf in self.leaves}
        layers = (m for m in self.modules if any(map(_is_of_torch, type(m).__mro__)))
        return any(id(p) in trained and p.dim() > 1 for m in layers for p in m.parameters(recurse=False))

    @property
    def unit_scale(self) -> float:
        """Factor of the per-unit terms: N/B where the subsampled plate is part of the unit, else 1."""
        return self.scale if self.plate in self.structure.unit else 1.0

    @property
    def strata(self) -> int:
        """Components of a stratified mixture in the guide, else 1."""
        return self.structure.strata

    def stratified(self, noise: Noise) -> Noise:
        """Noise of K runs ``(K, ...)`` to that of K C: each run once per component c of the guide's mixture.

        The uniforms by which the guide picks a component hold c + 1.5 instead, which no uniform can.
        """
        normal, uniform = (part.repeat_interleave(self.strata, 0) for part in noise)
        codes = torch.arange(self.strata, dtype=uniform.dtype, device=uniform.device) + 1.5
        slots = self.component_slots
        named = codes.repeat(len(noise.uniform)).unsqueeze(-1).expand(-1, slots.stop - slots.start)
        return Noise(normal, torch.cat([uniform[:, : slots.start], named, uniform[:, slots.stop :]], -1))

    # ---- parameters: a flat vector for the optimiser, a nested dict for people ----

    @property
    def groups(self) -> dict[str, slice]:
        """Where theta, phi and shared lie in the flat vector."""
        ends, at = {}, 0
        for group in GROUPS:
            size = sum(n for leaf, n in zip(self.leaves, self.sizes, strict=True) if leaf.group == group)
            ends[group] = slice(at, at + size)
            at += size
        return ends

    @property
    def present_groups(self) -> dict[str, slice]:
        """Those of :attr:`groups` that have parameters."""
        return {group: part for group, part in self.groups.items() if part.stop > part.start}

    def initial(self) -> Tensor:
        """Current values of all leaves as one flat vector ``(P,)``; a copy."""
        if not self.leaves:
            return torch.zeros(0, dtype=self.dtype, device=self.device)
        return torch.cat([leaf.tensor.detach().reshape(-1).to(self.dtype) for leaf in self.leaves])

    def replaced(self, x: Tensor, values: Mapping[str, Tensor], *, constrained: bool = False) -> Tensor:
        """Flat vector with the leaves in ``values`` at other values, by name; a value that is not finite once
        unconstrained, as of a scale outside its range, leaves the old one."""
        parts = []
        for leaf, part in zip(self.leaves, torch.split(x, self.sizes) if self.leaves else (), strict=True):
            value = values.get(leaf.name)
            if value is not None:
                free = transform_to(leaf.constraint).inv(value) if constrained else value
                flat = free.detach().reshape(-1).to(x)
                part = torch.where(torch.isfinite(flat), flat, part)
            parts.append(part)
        return torch.cat(parts) if parts else x

    def split(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Flat vector ``(P,)`` to ``(theta, phi)``, each by leaf name; shared leaves are in both."""
        parts = torch.split(x, self.sizes) if self.leaves else ()
        named = [(leaf, part.reshape(leaf.tensor.shape)) for leaf, part in zip(self.leaves, parts, strict=True)]
        theta = {leaf.name: part for leaf, part in named if leaf.group != "phi"}
        return theta, {leaf.name: part for leaf, part in named if leaf.group != "theta"}

    def params(self, x: Tensor) -> Params:
        """Flat vector to nested unconstrained leaves, copied."""
        theta, phi = self.split(x.detach().clone())
        values = {**theta, **phi}
        return {g: {leaf.name: values[leaf.name] for leaf in self.leaves if leaf.group == g} for g in GROUPS}

    def constrained(self, x: Tensor) -> dict[str, Tensor]:
        """Flat vector to constrained values by leaf name."""
        theta, phi = self.split(x.detach().clone())
        values = {**theta, **phi}
        return {leaf.name: transform_to(leaf.constraint)(values[leaf.name]) for leaf in self.leaves}

    def write_back(self, x: Tensor) -> None:
        """Copy values into the tensors that Pyro and the modules own: modules end up trained, in place.

        So are the buffers of the program's run, if it has any.
        """
        restore_buffers(self.buffers)
        theta, phi = self.split(x.detach())
        values = {**theta, **phi}
        with torch.no_grad():
            for leaf in self.leaves:
                leaf.tensor.copy_(values[leaf.name])

    # ---- data ----

    def with_data(self, args: tuple[Any, ...]) -> Program:
        """The same program over held-out rows; gathered minibatches only.

        Args:
            args: positional arguments that differ from the program's own in their numbers of rows, and in values.

        Raises:
            ValueError: if the program does not gather its rows from its arguments, or these are no such rows.
        """
        if self.minibatch is None or self.by_index:
            raise ValueError(
                "held-out data needs a minibatch whose rows are gathered from the arguments: pass "
                "minibatch=Minibatch(B, plate=...) over a plate of len(x), whose length may differ, or leave it out"
            )
        self._check_held_out(args)
        other = copy.copy(self)
        other.args = tuple(
            a.to(device=self.device, dtype=self.dtype if a.is_floating_point() else a.dtype)
            if isinstance(a, Tensor)
            else a
            for a in args
        )
        other.total = len(other.args[self.batched[0]])
        return other

    def _check_held_out(self, args: tuple[Any, ...]) -> None:
        if len(args) != len(self.args):
            raise ValueError(
                f"held_out holds {len(args)} positional arguments where args holds {len(self.args)}: give the same "
                "ones over other rows"
            )
        for i, (own, given) in enumerate(zip(self.args, args, strict=True)):
            if not isinstance(own, Tensor):
                continue
            if not isinstance(given, Tensor):
                raise ValueError(f"argument {i} of held_out is {type(given).__name__} where that of args is a tensor")
            if own.shape[1:] != given.shape[1:] or own.dim() != given.dim():
                raise ValueError(
                    f"argument {i} of held_out has shape {tuple(given.shape)} where that of args has "
                    f"{tuple(own.shape)}: they may differ in the number of rows only"
                )
            if own.dtype != given.dtype and not (own.is_floating_point() and given.is_floating_point()):
                raise ValueError(f"argument {i} of held_out is {given.dtype} where that of args is {own.dtype}")
        rows = {i: len(args[i]) for i in self.batched}
        if min(rows.values()) < 1 or len(set(rows.values())) > 1:
            told = ", ".join(f"{count} in argument {i}" for i, count in rows.items())
            raise ValueError(f"held_out needs one row or more, as many in every argument of rows, got {told}")

    def differs_in_rows_only(self, other: Program) -> bool:
        """Whether all positional arguments that hold no rows are those of ``other``, made by :meth:`with_data`.

        They go into a graph as constants, which then serves both.
        """

        def same(mine: Any, theirs: Any) -> bool:
            if isinstance(mine, Tensor):
                return mine is theirs or torch.equal(mine, theirs)
            return mine is theirs or (isinstance(mine, str | int | float) and mine == theirs)

        return all(same(self.args[i], other.args[i]) for i in range(len(self.args)) if i not in self.batched)

    def batch(self, indices: Tensor | None) -> Batch:
        """The batch of given row indices ``(..., B)``, leading dimensions kept; whole data for None."""
        if indices is None or self.minibatch is None:
            return Batch(tuple(self.args[i] for i in self.batched))
        indices = indices.to(self.device)
        if self.by_index:
            return Batch(indices=indices)
        return Batch(tuple(self.args[i][indices] for i in self.batched))

    def example(self) -> tuple[Noise, Batch]:
        """Noise and batch of one run, for tracing: fixed values of the right shapes."""
        noise = self.layout.draw(torch.Generator(self.device).manual_seed(0), dtype=self.dtype)
        return noise, self.batch(torch.arange(self.minibatch.size) % self.total if self.minibatch else None)

    def positional(self, batch: Batch) -> tuple[Any, ...]:
        """All positional arguments of the model, with the batch in place."""
        args = list(self.args)
        for i, value in zip(self.batched, batch.args, strict=bool(batch.args)):
            args[i] = value
        return tuple(args)

    # ---- the pure function, by Pyro's handlers ----

    @property
    def plate(self) -> str | None:
        """Name of the subsampled plate."""
        return self.minibatch.plate if self.minibatch else None

    def _values(self, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
        return {id(leaf.tensor): values[leaf.name] for leaf in self.leaves if leaf.name in values}

    @contextmanager
    def handlers(self, noise: Noise | None, batch: Batch, *, tracing: bool = False) -> Iterator[Tape]:
        """Pyro's handlers with noise, rows and parameters externalised; yields the tape."""
        tape = Tape(noise, {}, mark_no_grad=tracing)
        with ExitStack() as stack:
            stack.enter_context(quiet_pyro(self.store, self.dtype, self.device))
            if self.untaped and noise is not None:
                high, low = (int(float(u) * 2**24) for u in noise.uniform[:UNTAPED_SEED])
                stack.enter_context(random_state(self.device, (high << 24) + low))
            if self.plate is not None:
                stack.enter_context(Rows({self.plate: batch.indices}))
            stack.enter_context(ParamValues(tape))
            stack.enter_context(taped(tape))
            yield tape

    def _traces(
        self,
        tape: Tape,
        theta: Mapping[str, Tensor],
        phi_sample: Mapping[str, Tensor],
        phi_density: Mapping[str, Tensor],
        batch: Batch,
    ) -> tuple[Trace, Trace, Trace]:
        """Guide trace as drawn, guide trace with the densities of ``phi_density``, model trace; densities computed."""
        args = self.positional(batch)
        if self.untaped:
            tape.uniforms = UNTAPED_SEED
        tape.values = self._values(phi_sample)
        drawn = guide_trace(self.guide, args, self.kwargs)
        guide = drawn
        if phi_density is not phi_sample:
            tape.values = self._values(phi_density)
            before = tape.used
            try:
                with poutine.replay(trace=anew(drawn)):
                    guide = guide_trace(self.guide, args, self.kwargs)
            except TapeEnds:
                raise ValueError(NOISY_GUIDE) from None
            if tape.used != before:
                raise ValueError(NOISY_GUIDE)
            if self.structure.score_sites:
                drawn.compute_log_prob()
        guide.compute_log_prob()
        tape.values = self._values(theta)
        model = poutine.trace(poutine.replay(self.density_model, trace=drawn)).get_trace(*args, **self.kwargs)
        model.compute_log_prob()
        return drawn, guide, model

    def scale_of(self, site: dict[str, Any]) -> Any:
        """Scale of a site, poutine scales in, the scale of ``plate(N, B)`` out."""
        scale = site["scale"]
        for frame in site["cond_indep_stack"]:
            if frame.name == self.plate:
                scale = scale / subsampling(frame)
        return scale

    def factor(self, frame: Any) -> float:
        """N/B of the subsampled plate, 1 of any other."""
        return self.scale if frame.name == self.plate else 1.0

    def log_weights(
        self,
        theta: Mapping[str, Tensor],
        phi_sample: Mapping[str, Tensor],
        phi_density: Mapping[str, Tensor],
        noise: Noise,
        batch: Batch,
        *,
        tracing: bool = False,
    ) -> Terms:
        """Log densities of one draw, by running Pyro's handlers."""
        with self.handlers(noise, batch, tracing=tracing) as tape:
            drawn, guide, model = self._traces(tape, theta, phi_sample, phi_density, batch)
            zero = torch.zeros(1, dtype=self.dtype, device=self.device)
            return collect(drawn, guide, model, self.structure, self, self.analytic, zero)

    def site_values(self, x: Tensor, noise: Noise, batch: Batch) -> SiteValues:
        """Values and log-likelihoods of one draw at flat parameters ``x``."""
        theta, phi = self.split(x)
        with self.handlers(noise, batch) as tape:
            _, guide, model = self._traces(tape, theta, phi, phi, batch)
            deterministic = {
                name: site["value"]
                for name, site in model.nodes.items()
                if site["type"] == "sample" and is_deterministic(site)
            }
            summed = sums(model, self.scale_of, self.factor)
            alone = list(apart(model, summed))
            observed = [s for s in alone if s["is_observed"]]
            zero = torch.zeros((), dtype=self.dtype, device=self.device)
            log_p = sum((density_of(s, self).sum() for s in alone), zero)
            return SiteValues(
                {s["name"]: s["value"] for s in latent_sites(model)},
                deterministic,
                {s["name"]: scale_and_mask(s["unscaled_log_prob"], 1.0, s["mask"]) for s in observed},
                [one for one in summed if one.observed],
                sum((one.density.sum() for one in summed), log_p),
                sum((density_of(s, self).sum() for s in random_sites(guide)), zero),
            )

    def drawn(self, x: Tensor, noise: Noise, batch: Batch) -> Trace:
        """Guide trace of one draw with its log-probabilities, differentiable in the flat parameters ``x``."""
        with self.handlers(noise, batch) as tape:
            tape.values = self._values(self.split(x)[1])
            trace = guide_trace(self.guide, self.positional(batch), self.kwargs)
            trace.compute_log_prob()
        return trace

    @property
    def changing(self) -> list[str]:
        """Which buffers of networks change as the program runs, in words."""
        return [obstacle for obstacle in self.obstacles if obstacle.startswith("buffer")]

    def changing_buffers(self) -> dict[str, Tensor]:
        """Buffers of the networks as they are now; empty where they do not change."""
        return by_name(copies_of(self.modules)) if self.changing else {}

    def with_buffers(self, values: Mapping[str, Tensor]) -> Program:
        """The same program with the buffers that a run ended with, in force where :meth:`networks_kept` is."""
        if not values:
            return self
        other = copy.copy(self)
        other.buffers = of_modules(self.modules, values)
        return other

    @contextmanager
    def networks_kept(self) -> Iterator[None]:
        """Inside, networks have the buffers of the program's run, if it has any; whatever runs leaves them as found."""
        with buffers_kept(self.modules):
            restore_buffers(self.buffers)
            yield

    def bind(self, function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
        """``function`` (model or guide) that runs with the values ``x``, in a store of its own."""
        theta, phi = self.split(x.detach().clone())
        values = self._values({**theta, **phi})

        def bound(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                stack.enter_context(quiet_pyro(self.store, self.dtype, self.device))
                stack.enter_context(self.networks_kept() if self.buffers else nullcontext())
                stack.enter_context(Tape(None, values, serve=False))
                return function(*args, **kwargs)

        return bound

    def leaves_support(self, x: Tensor, noise: Noise, batch: Batch) -> str:
        """Which site has values that the model knows no density of, over the draws of ``noise`` ``(M, ...)``, in words.

        Outside a support the formula of a density may be finite, so that nothing else tells.
        """
        theta, phi = self.split(x)
        for draw in range(len(noise.normal)):
            with torch.no_grad(), self.handlers(noise.at(draw), batch) as tape:
                _, _, model = self._traces(tape, theta, phi, phi, batch)
            for site in apart(model, sums(model, self.scale_of, self.factor)):
                if support := leaves_support(site):
                    return (
                        f"site {site['name']!r} has no density at values that the guide draws: they leave the support "
                        f"{support}, which must not depend on a latent, and which the prior must name"
                    )
        return ""

    def first_bad_site(self, x: Tensor, noise: Noise, batch: Batch) -> str:
        """Which site's value or log-probability is not finite, over the draws of ``noise`` ``(M, ...)``, in words."""
        theta, phi = self.split(x)
        for draw in range(len(noise.normal)):
            with torch.no_grad(), self.handlers(noise.at(draw), batch) as tape:
                _, guide, model = self._traces(tape, theta, phi, phi, batch)
            for where, trace in (("guide", guide), ("model", model)):
                summed = sums(trace, self.scale_of, self.factor)
                for one in summed:
                    if not bool(torch.isfinite(one.density).all()):
                        return f"the log-probability of sites {', '.join(one.sites)}, summed out, is not finite"
                for site in apart(trace, summed):
                    if what := _bad(site):
                        return f"the {what} of {where} site {site['name']!r} is not finite"
                    if not site["is_observed"] and (support := outside(site)):
                        return f"the guide draws values of site {site['name']!r} outside its support {support}"
        return "every log-probability is finite, but the gradient is not"
