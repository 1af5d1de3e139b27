"""Independent draws from a fitted guide: values, densities and replicated data, vectorised where the program allows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bbvi_conv.engine.compiled_map import compiled_where_it_pays
from bbvi_conv.posterior.sites import Variable, inspect_sites, replay, variable
from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.graphs import simplify, widths
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise, NoiseLayout, generator, random_state
from bbvi_conv.program.program import Program
from bbvi_conv.program.rounds import with_short_rounds
from bbvi_conv.program.tape import Tape, TapeEnds, taped
from bbvi_conv.program.trace import over_draws

STREAM = "predict"
REPLICATION = "predict data"
MEMORY = 100_000_000
"""Numbers that the intermediate values of one vectorised piece may hold."""
LANES = 8
"""Draws that are one operation of compiled code: what they share, as an encoder, is computed once for all."""
PIECE = 512
"""Draws in one call of compiled code, whose intermediate values are those of ``LANES`` of them."""

GLOBAL_ROWS = 4096
"""Rows seen at once where all latents are global."""

Function = Callable[..., dict[str, Tensor]]


class Draws(NamedTuple):
    """S independent draws; every tensor has the draws in front.

    Attributes:
        latent, deterministic: values by site, constrained; enumerated sites are drawn given the others and the data.
        log_likelihood: per observation, zero where masked, factors left out; sites that follow from enumerated ones
            have one together, under their names joined by ``+`` and along the plates that they share.
        replicated: new data at the same draws, by observed site.
        log_p, log_q: ``(S,)``, joint log densities in nats of the rows drawn; log_p is None where the latents are
            global and the rows are not all.
        rows: ``(R,)`` indices of the subsampled plate's rows, None for the whole data.
        kept: a plate cut to its first entries and how many there are, None where nothing was cut.
        variables: the sites.
    """

    latent: dict[str, Tensor]
    deterministic: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    replicated: dict[str, Tensor]
    log_p: Tensor | None
    log_q: Tensor
    rows: Tensor | None
    kept: tuple[str, int] | None
    variables: dict[str, Variable]


def draw(
    program: Program,
    x: Tensor,
    num_samples: int,
    seed: int,
    rows: Tensor | None = None,
    *,
    kept: tuple[str, int] | None = None,
    replicate: bool = False,
) -> Draws:
    """Draw from the guide at flat parameters ``x``, replay the draws through the model and sample its data anew.

    The noise is that of the ``predict`` stream; torch's own generator is left as found.

    Args:
        program: the program.
        x: flat parameters ``(P,)``.
        num_samples: S.
        seed: of the noise.
        rows: with a minibatch, which rows to see, taken in parts of at most B; None: the first B.
        kept: ``(plate, R)``: keep only the first R entries of a plate.
        replicate: whether to draw new data.

    Raises:
        ValueError: if ``num_samples`` is below 1, or rows do not fit the program.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    x = x.detach()
    parts = row_parts(program, x, rows)
    sites, _ = describe(program, x, program.batch(parts[0]))
    sampler = _Sampler(program, x, sites, kept, replicate)
    pieces = []
    for index, part in enumerate(parts):
        key = index if local(program) else 0  # global latents must be the same draws in every part
        gen = generator(seed, STREAM, key, program.device)
        noise = program.layout.draw(gen, num_samples, dtype=program.dtype)
        pieces.append(sampler.part(noise, program.batch(part), generator(seed, REPLICATION, index, program.device)))
    groups: dict[str, dict[str, Tensor]] = {"latent": {}, "deterministic": {}, "log_likelihood": {}, "replicated": {}}
    for name in pieces[0]:
        group, _, site = name.partition(":")
        if group in groups:
            groups[group][site] = join([p[name] for p in pieces], variable(sites, group, site), program.plate, group)
    seen = None if parts[0] is None else torch.cat([part for part in parts if part is not None])
    log_p, log_q = _densities(program, pieces, sites, seen)
    return Draws(**groups, log_p=log_p, log_q=log_q, rows=seen, kept=kept, variables=sites)


def local(program: Program) -> bool:
    """Whether every latent of a subsampled program belongs to one row."""
    sites = (*program.structure.latents, *program.structure.auxiliary)
    return all(any(p[0] == program.plate for p in site.plates) for site in sites)


def mixed(program: Program) -> bool:
    """Whether a subsampled program has latents of both kinds, of one row and of all."""
    sites = (*program.structure.latents, *program.structure.auxiliary)
    inside = [any(p[0] == program.plate for p in site.plates) for site in sites]
    return any(inside) and not all(inside)


def row_step(program: Program, x: Tensor) -> int:
    """B where the model takes B rows at a time and no other number; 1 where its plate takes the size of what comes."""
    assert program.minibatch is not None
    size = program.minibatch.size
    if program.by_index or size == 1:
        return size
    try:
        sites, _ = describe(program, x, program.batch(torch.arange(size - 1)))
    except (IndexError, RuntimeError, ValueError):
        return size
    sizes = {p[2] for v in sites.values() for p in v.plates if p[0] == program.plate}
    return 1 if sizes == {size - 1} else size


def row_parts(program: Program, x: Tensor, rows: Tensor | None) -> list[Tensor | None]:
    """Rows in parts that the program can see at once; ``[None]`` for the whole data.

    Raises:
        ValueError: where several parts would need one draw of the global latents and fresh ones of the local.
    """
    if program.minibatch is None:
        if rows is not None:
            raise ValueError("rows are for programs with a minibatch; this one sees the whole data at once")
        return [None]
    size = program.minibatch.size
    rows = torch.arange(size) if rows is None else rows
    step = row_step(program, x)
    if len(rows) % step:
        raise ValueError(f"plate {program.plate!r} takes {size} rows at a time, got {len(rows)}: ask for a multiple")
    if mixed(program) and len(rows) > size:
        raise ValueError(
            f"the model has latents inside and outside plate {program.plate!r}: at most {size} rows at once"
        )
    if step == 1 and not local(program):  # no noise goes with the rows, so more of them can be seen at once
        size = max(size, GLOBAL_ROWS)
    return list(torch.split(rows, size))


def describe(program: Program, x: Tensor, batch: Batch) -> tuple[dict[str, Variable], dict[str, Tensor]]:
    """The sites of the model and its data, as one draw at ``x`` shows them."""
    noise = program.layout.draw(generator(0, STREAM, 0, program.device), dtype=program.dtype)
    with torch.no_grad(), program.networks_kept():
        return inspect_sites(program, x, program.site_values(x.detach(), noise, batch), batch)


class _Sampler:
    """Draws for one part of the rows after the other; the graph is traced once per shape of the parts."""

    def __init__(
        self, program: Program, x: Tensor, sites: dict[str, Variable], kept: tuple[str, int] | None, replicate: bool
    ) -> None:
        self.program, self.x, self.sites, self.kept = program, x, sites, kept
        self.free = [v.name for v in sites.values() if v.kind == "observed" and not v.silent] if replicate else []
        self.again = bool(self.free) or program.enumerated is not None  # whether the model runs once more
        self.graphs: dict[Any, Mapped] = {}
        self.beside = False  # whether new data take their noise from torch's generator, beside the tape

    def values(self, noise: Noise, more: Noise, part: Batch) -> dict[str, Tensor]:
        """One draw: everything wanted of it, keyed ``group:site``."""
        seen = self.program.site_values(self.x, noise, part)
        groups = {"latent": seen.latent, "deterministic": seen.deterministic}
        groups["log_likelihood"] = {n: v for n, v in seen.log_likelihood.items() if self.sites[n].kind == "observed"}
        together = {one.name: one.log_likelihood for one in seen.sums}
        groups["log_likelihood"] |= {n: v for n, v in together.items() if f"log_likelihood:{n}" in self.sites}
        if self.again:
            with taped(Tape(None if self.beside else more, {})):
                trace = replay(self.program, self.x, seen.latent, part, self.free)
            groups["replicated"] = _values(trace, self.free)
            drawn = [site.name for site in self.program.structure.enumerated]
            groups["latent"] = seen.latent | _values(trace, drawn)
            if drawn:  # what follows from them is known only now, from the data as they are
                if self.free:
                    again = seen.latent | {name: trace.nodes[name]["value"] for name in drawn}
                    trace = replay(self.program, self.x, again, part)
                groups["deterministic"] = _values(trace, seen.deterministic)
        out = {
            f"{group}:{name}": cut(value, variable(self.sites, group, name), self.kept, group)
            for group, named in groups.items()
            for name, value in named.items()
        }
        out |= {f"sum:{n}": v.sum() for n, v in groups["log_likelihood"].items()}
        return out | {"log_p": seen.log_p, "log_q": seen.log_q}

    def part(self, noise: Noise, batch: Batch, replication: torch.Generator) -> dict[str, Tensor]:
        """S draws over one part of the rows, each tensor ``(S, ...)``."""
        program, count = self.program, len(batch.args)
        fixed = [*batch.args, *([batch.indices] if batch.indices is not None else [])]

        def function(*given: Tensor) -> dict[str, Tensor]:
            noise, more, data = Noise(*given[:2]), Noise(*given[2:4]), given[4:]
            return self.values(noise, more, Batch(data[:count], data[count] if len(data) > count else None))

        seed = int(torch.randint(2**62, (), generator=replication, device=program.device))
        with torch.no_grad(), program.networks_kept(), random_state(program.device, seed):  # beside the tape
            layout, complete = NoiseLayout(0, 0), True
            if self.again:
                latents = program.site_values(self.x, noise.at(0), batch).latent
                with taped(Tape(None, {})) as tape:
                    replay(program, self.x, latents, batch, self.free)
                layout, complete = tape.used, not tape.untaped
            more = layout.draw(replication, len(noise.normal), dtype=program.dtype)
            moving, shapes = [*noise, *more], tuple(f.shape for f in fixed)
            try:
                return self._mapped(function, moving, fixed, shapes, random=not complete)
            except TapeEnds:  # a distribution that draws until something fits
                if self.beside:
                    raise
            self.beside = True
            self.graphs.clear()
            return self._mapped(function, moving, fixed, shapes, random=True)

    def _mapped(
        self, function: Function, moving: list[Tensor], fixed: list[Tensor], shapes: tuple[Any, ...], *, random: bool
    ) -> dict[str, Tensor]:
        """The function's values for every draw, by a graph that is kept for parts of these shapes."""
        if shapes not in self.graphs:
            trace, random = not self.program.obstacles, random or self.beside
            self.graphs[shapes] = Mapped(function, moving, fixed, trace=trace, random=random)
        return self.graphs[shapes](moving, fixed)


def _values(trace: Trace, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(trace.nodes[name]["value"]) for name in names}


class Mapped:
    """``function(*moving[s], *fixed)`` for every draw s, stacked: by ``vmap`` over a traced graph, else by a loop.

    Args:
        function: returns tensors by name.
        moving: example tensors with S in front.
        fixed: example tensors passed as they are.
        trace: whether to try a graph at all.
        random: whether it draws from torch's generator as well.
        runs: draws that are expected in all; None: those of ``moving``. Where they repay it the graph is compiled.
    """

    def __init__(
        self,
        function: Function,
        moving: Sequence[Tensor],
        fixed: Sequence[Tensor],
        *,
        trace: bool,
        random: bool = False,
        runs: int | None = None,
    ) -> None:
        self.names: list[str] = []

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            out = function(*tensors)
            self.names = list(out)
            return tuple(out.values())

        flags = [True] * len(moving) + [False] * len(fixed)
        self.call, self.piece = over_draws(flat, flags, vectorise=False), 1
        if trace:
            with suppress(RuntimeError):  # whatever a graph or vmap cannot do, a loop can
                example = [*(m[0].clone() for m in moving), *(f.clone() for f in fixed)]
                graph = simplify(to_graph(flat, *example, random=random))
                graph = with_short_rounds(graph, example, functools.partial(over_draws, vectorise=True))
                vectorised = over_draws(graph, flags, vectorise=True, randomness="different" if random else "error")
                vectorised(*(m[:2] for m in moving), *fixed)
                self.call, self.piece = vectorised, max(1, MEMORY // max(1, sum(widths(graph))))
                draws = 0 if random else runs or len(moving[0])
                compiled = compiled_where_it_pays(graph, example, flags, draws, lanes=LANES)
                if compiled is not None:
                    self.call, self.piece = compiled, max(self.piece, PIECE)

    def __call__(self, moving: Sequence[Tensor], fixed: Sequence[Tensor]) -> dict[str, Tensor]:
        """Values by name, each with S in front."""
        draws, piece = len(moving[0]), self.piece
        parts = [self.call(*(m[s : s + piece] for m in moving), *fixed) for s in range(0, draws, piece)]
        columns = zip(*parts, strict=True)
        return {name: torch.cat(column) for name, column in zip(self.names, columns, strict=True)}


def axis_of(site: Variable, plate: str | None, group: str) -> int | None:
    """Dimension, from the right, that runs over a plate; log-likelihoods have no event dimensions."""
    axis = site.axis(plate)
    return axis + site.event_dim if axis is not None and group == "log_likelihood" else axis


def cut(value: Tensor, site: Variable, kept: tuple[str, int] | None, group: str) -> Tensor:
    axis = None if kept is None else axis_of(site, kept[0], group)
    if kept is None or axis is None or value.shape[axis] <= kept[1]:
        return value
    return value.narrow(axis, 0, kept[1])


def join(parts: list[Tensor], site: Variable, plate: str | None, group: str) -> Tensor:
    """Parts of the rows put together along the plate; outside it all parts are alike."""
    axis = axis_of(site, plate, group)
    return parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, axis)


def _densities(
    program: Program, pieces: list[dict[str, Tensor]], sites: dict[str, Variable], rows: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Joint log densities of all parts together: what lies outside the plate counts once."""
    log_p, log_q = pieces[0]["log_p"], pieces[0]["log_q"]
    if program.minibatch is None:
        return log_p, log_q
    likelihoods = {v.name: v for v in sites.values() if f"sum:{v.name}" in pieces[0]}  # what is together comes last
    if local(program):
        outside = [name for name, v in likelihoods.items() if not v.inside(program.plate)]
        for piece in pieces[1:]:
            log_p = log_p + piece["log_p"] - sum((piece[f"sum:{n}"] for n in outside), torch.zeros_like(log_p))
            log_q = log_q + piece["log_q"]
        return log_p, log_q
    whole = rows is not None and len(set(rows.tolist())) == program.total
    inside = [v for v in likelihoods.values() if v.inside(program.plate)]
    factors = [v for v in sites.values() if v.inside(program.plate) and v.kind == "factor"]
    if not whole or factors or any(v.scaled for v in inside):
        return None, log_q
    for piece in pieces[1:]:
        log_p = log_p + sum((piece[f"sum:{v.name}"] for v in inside), torch.zeros_like(log_p))
    return log_p, log_q
