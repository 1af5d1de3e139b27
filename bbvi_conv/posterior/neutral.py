"""A fitted posterior as one neutral dict: arrays with named dimensions, coordinates from plates, attributes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bbvi_conv.posterior.draws import Draws, axis_of, cut, describe, draw, join, local, mixed, row_parts, row_step
from bbvi_conv.posterior.sites import Variable, variable
from bbvi_conv.program.program import Program

if TYPE_CHECKING:
    from bbvi_conv.fitting import Fit

CAP = 20_000_000
"""Numbers that an export may hold; beyond it only the first entries of the largest plate are kept."""

CHAIN, SAMPLE = "chain", "sample"

Numbers = NDArray[Any]


class Named(NamedTuple):
    """An array and the names of its dimensions."""

    dims: tuple[str, ...]
    values: Numbers


class Neutral(NamedTuple):
    """What every export is written from.

    Attributes:
        groups: arrays by group and variable; ``sample`` is the first dimension of draws, with several seeds after
            ``chain``.
        coords: values along the named dimensions.
        attrs: what the numbers are, in strings and numbers.
    """

    groups: dict[str, dict[str, Named]]
    coords: dict[str, Numbers]
    attrs: dict[str, str | int | float]


class Plan(NamedTuple):
    """How much of a posterior fits under the cap."""

    draws: int
    rows: Tensor | None
    kept: tuple[str, int] | None
    note: str


def neutral(fit: Fit, num_samples: int = 1000) -> Neutral:
    """Draws of a fit with their densities, replicated data, data and names.

    Groups: posterior (constrained, deterministic and enumerated sites included), log_likelihood (per observation,
    factors left out; together for what follows from one set of enumerated sites, over all their values),
    posterior_predictive, observed_data, constant_data (tensor arguments that are not observed), sample_stats
    (``log_p`` and ``log_q``, nats). A plate's name is its dimension's name; event dimensions are ``{site}_dim_{i}``.
    Every seed is a chain, named by its seed; of a single seed, chain 0. Seeds that diverged are left out.

    Args:
        fit: the fit.
        num_samples: draws of each seed.

    Raises:
        ValueError: if ``num_samples`` is below 1.
    """
    settings, seeds = fit.settings, [one for one in fit.seeds if not one.state.frozen or one.x is fit.x]
    share = {"num_samples": num_samples, "parts": len(seeds)}
    exported = together(
        {one.settings.seed: from_program(fit.program, one.x, seed=one.settings.seed, **share) for one in seeds}
    )
    exported.attrs.update(
        family=repr(settings.family) if _of_family(fit.program.guide) else "none: the guide was given",
        objective=repr(settings.bound()),
        outcome=fit.verdict.outcome,
        engine=fit.engine_name,
        steps=fit.state.step,
    )
    return exported


def together(parts: Mapping[int, Neutral]) -> Neutral:
    """One export from those of several seeds, each a chain; of one, itself."""
    first, *others = parts.values()
    if not others:
        return first

    def stacked(group: str, name: str, array: Named) -> Named:
        if array.dims[:1] != (SAMPLE,):
            return array
        values = np.stack([part.groups[group][name].values for part in parts.values()])
        return Named((CHAIN, *array.dims), values)

    groups = {g: {name: stacked(g, name, array) for name, array in named.items()} for g, named in first.groups.items()}
    chain = "one chain per seed, named by it: independent draws of what that seed found; R-hat says whether they agree"
    seeds: dict[str, str | int | float] = {"chain": chain, "seeds": " ".join(map(str, parts))}
    return Neutral(groups, first.coords | {CHAIN: np.array(list(parts))}, first.attrs | seeds)


def from_program(program: Program, x: Tensor, *, num_samples: int = 1000, seed: int = 0, parts: int = 1) -> Neutral:
    """:func:`neutral` of a program at flat parameters ``x``; what only a fit knows is left out."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    x = x.detach()
    first = None if program.minibatch is None else torch.arange(program.minibatch.size)
    sites, _ = describe(program, x, program.batch(first))
    step = 1 if program.minibatch is None else row_step(program, x)
    chosen = plan(program, sites, num_samples, step=step, parts=parts)
    draws = draw(program, x, chosen.draws, seed, chosen.rows, kept=chosen.kept, replicate=True)
    data = _observed(program, x, draws)
    names = _Names(program, draws)
    groups = {
        "posterior": names.sampled(draws.latent | draws.deterministic),
        "sample_stats": _densities(draws),
        "log_likelihood": names.sampled(draws.log_likelihood, "log_likelihood"),
        "posterior_predictive": names.sampled(draws.replicated),
        "observed_data": names.plain(data),
        "constant_data": names.constants(_arguments(program), data),
    }
    return Neutral({g: v for g, v in groups.items() if v}, names.coords, _attributes(program, draws, seed, chosen))


def plan(
    program: Program, sites: dict[str, Variable], num_samples: int, *, step: int = 1, parts: int = 1, cap: int = CAP
) -> Plan:
    """Rows, a multiple of ``step``, and draws that keep an export of ``parts`` seeds under ``cap`` numbers."""
    cap //= parts

    def numbers(site: Variable) -> int:
        batch = torch.Size(site.shape[: len(site.shape) - site.event_dim]).numel()
        return {"latent": site.numel, "deterministic": site.numel, "observed": site.numel + batch}.get(site.kind, 0)

    sizes = {name: size for v in sites.values() for name, _, size in v.plates}
    plate = program.plate or max(sizes, key=lambda n: sizes[n], default=None)
    every = sum(numbers(v) for v in sites.values())
    inside = sum(numbers(v) for v in sites.values() if v.axis(plate) is not None)
    shown = sizes.get(plate, 1) if plate else 1
    per_row, total = inside / shown, program.total if program.minibatch else shown
    fitting = total if not per_row else min(total, max(1, int((cap / num_samples - (every - inside)) / per_row)))
    why = f"stays near {cap} numbers"
    if program.minibatch is not None:
        size = program.minibatch.size
        fitting = max(fitting // step, 1) * step
        if mixed(program) and fitting > size:
            fitting, why = size, "holds what one batch of rows and the latents that all rows share are together"
    left = int(every - inside + per_row * fitting)
    draws = max(1, min(num_samples, cap // max(1, left)))
    notes = []
    if fitting < total:
        notes.append(f"holds the first {fitting} of the {total} entries of plate {plate}")
    if draws < num_samples:
        notes.append(f"holds {draws} draws instead of {num_samples}")
    note = f"{' and '.join(notes)}, so that it {why}" if notes else ""
    if program.minibatch is not None:
        return Plan(draws, torch.arange(fitting), None, note)
    return Plan(draws, None, (plate, fitting) if plate and fitting < total else None, note)


class _Names:
    """Dimension names and coordinates; a name that is taken by a variable of its own gets a suffix."""

    def __init__(self, program: Program, draws: Draws) -> None:
        self.program, self.draws = program, draws
        self.sizes = {name: size for v in draws.variables.values() for name, _, size in v.plates}
        if draws.rows is not None and program.plate is not None:
            self.sizes[program.plate] = len(draws.rows)
        if draws.kept is not None:
            self.sizes[draws.kept[0]] = draws.kept[1]
        self.taken = {label(n) for n in draws.variables} | {label(n) for n, _ in _arguments(program)}
        self.coords: dict[str, Numbers] = {}

    def plate(self, name: str) -> str:
        """Dimension of a plate, its coordinate noted."""
        dim = label(name)
        if dim in self.taken or dim in ("chain", "draw", SAMPLE):
            dim = f"{dim}_dim"
        rows = self.draws.rows
        whole = rows is None or name != self.program.plate
        self.coords[dim] = np.arange(self.sizes[name]) if whole or rows is None else rows.cpu().numpy()
        return dim

    def sampled(self, values: dict[str, Tensor], group: str = "") -> dict[str, Named]:
        """Arrays with the draws in front."""
        out = {}
        for name, value in values.items():
            site = variable(self.draws.variables, group, name)
            named = self._named(site, value[0].shape, group)
            shape = (len(value), *(value.shape[i + 1] for i in named))
            out[label(name)] = Named((SAMPLE, *named.values()), numpy(value).reshape(shape))
        return out

    def plain(self, values: dict[str, Tensor]) -> dict[str, Named]:
        """Arrays of data."""
        out = {}
        for name, value in values.items():
            named = self._named(self.draws.variables[name], value.shape, "")
            out[label(name)] = Named(tuple(named.values()), numpy(value).reshape([value.shape[i] for i in named]))
        return out

    def constants(self, arguments: Sequence[tuple[str, Tensor]], data: dict[str, Tensor]) -> dict[str, Named]:
        """Tensor arguments that are no site's data, cut to the same rows."""
        out = {}
        for name, value in arguments:
            value, plate = self._rows(value)
            if any(v.shape == value.shape and torch.equal(v, value.to(v)) for v in data.values()):
                continue
            if value.numel() > CAP:
                continue
            own = label(name)
            dims = [f"{own}_dim_{i}" for i in range(value.dim())]
            if plate is not None:
                dims = [self.plate(plate), *(f"{own}_dim_{i}" for i in range(value.dim() - 1))]
            out[own] = Named(tuple(dims), numpy(value))
        return out

    def _rows(self, value: Tensor) -> tuple[Tensor, str | None]:
        """The rows exported, and the plate that the leading dimension runs over, where that is clear."""
        program, draws = self.program, self.draws
        if value.dim() == 0:
            return value, None
        if program.minibatch is not None and draws.rows is not None:
            return (value[draws.rows], program.plate) if len(value) == program.total else (value, None)
        sizes = {name: size for v in draws.variables.values() for name, _, size in v.plates}
        fitting = [name for name, size in sizes.items() if size == len(value)]
        if len(fitting) != 1:
            return value, None
        return value[: self.sizes[fitting[0]]], fitting[0]

    def _named(self, site: Variable, shape: torch.Size, group: str) -> dict[int, str]:
        """Name by axis; axes of size 1 that only make room for a plate further left are dropped."""
        plates = {axis_of(site._replace(plates=(p,)), p[0], group): p[0] for p in site.plates}
        leftmost = min((a for a in plates if a is not None), default=0)
        events = 0 if group == "log_likelihood" else site.event_dim
        names: dict[int, str] = {}
        own = 0
        for i, size in enumerate(shape):
            axis = i - len(shape)
            plate = plates.get(axis)
            if plate is not None and size == self.sizes[plate]:
                names[i] = self.plate(plate)
            elif size == 1 and -axis > events and axis > leftmost:
                continue
            else:
                names[i] = f"{label(site.name)}_dim_{own}"
                own += 1
        return names


def label(name: str) -> str:
    """A site's name as a variable of a file, where a slash would open a group.

    Example:
        >>> label("layer/weight")
        'layer.weight'
    """
    return name.replace("/", ".")


def numpy(value: Tensor) -> Numbers:
    """A tensor as an array on the host."""
    array: Numbers = value.detach().cpu().numpy()
    return array


def _observed(program: Program, x: Tensor, draws: Draws) -> dict[str, Tensor]:
    """Data of the observed sites, the exported rows only."""
    parts = [describe(program, x, program.batch(part))[1] for part in row_parts(program, x, draws.rows)]
    sites = draws.variables
    joined = {name: join([p[name] for p in parts], sites[name], program.plate, "") for name in parts[0]}
    return {name: cut(value, sites[name], draws.kept, "") for name, value in joined.items()}


def _densities(draws: Draws) -> dict[str, Named]:
    both = {"log_p": draws.log_p, "log_q": draws.log_q}
    return {name: Named((SAMPLE,), numpy(value)) for name, value in both.items() if value is not None}


def _arguments(program: Program) -> list[tuple[str, Tensor]]:
    """Tensor arguments of the model by name."""
    function = program.model.forward if isinstance(program.model, nn.Module) else program.model
    try:
        bound = inspect.signature(function).bind(*program.args, **program.kwargs).arguments
    except (TypeError, ValueError):
        bound = {f"argument_{i}": value for i, value in enumerate(program.args)} | program.kwargs
    found = []
    for name, value in bound.items():
        if isinstance(value, tuple):
            found += [(f"{name}_{i}", v) for i, v in enumerate(value) if isinstance(v, Tensor)]
        elif isinstance(value, dict):
            found += [(str(n), v) for n, v in value.items() if isinstance(v, Tensor)]
        elif isinstance(value, Tensor):
            found.append((name, value))
    return found


def _attributes(program: Program, draws: Draws, seed: int, chosen: Plan) -> dict[str, str | int | float]:
    import pyro

    from bbvi_conv import __version__

    attrs: dict[str, str | int | float] = {
        "inference_library": "bbvi_conv",
        "inference_library_version": __version__,
        "inference_method": "variational",
        "draws": "independent draws of the variational distribution q, not a chain",
        "chain": "the chain dimension has length 1 because ArviZ's format asks for one",
        "sample_stats": "log_p is log p(data, latents), log_q is log q(latents), in nats, per draw",
        "seed": seed,
        "torch_version": str(torch.__version__),
        "pyro_version": str(pyro.__version__),
    }
    if chosen.note:
        attrs["size"] = chosen.note
    if program.minibatch is not None and draws.rows is not None and len(draws.rows) < program.total:
        covers = f"both cover the {len(draws.rows)} rows held here"
        attrs["sample_stats_rows"] = covers if local(program) else "log_p needs all rows and is left out"
    silent = [f"{v.name}: {v.silent}" for v in draws.variables.values() if v.silent]
    if silent:
        attrs["posterior_predictive"] = f"without {'; '.join(silent)}"
    point = [leaf.name for leaf in program.leaves if leaf.group != "phi"]
    if point:
        attrs["point_estimates"] = f"generative parameters are point estimates: {', '.join(point)}"
    return attrs


def _of_family(guide: Any) -> bool:
    """Whether a family of this package made the guide."""
    return type(guide).__module__.startswith("bbvi_conv.families")
