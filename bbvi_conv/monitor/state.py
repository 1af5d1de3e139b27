r"""What the monitor remembers of a run: one :class:`Look` per stratum, a pure update, and the figures read off it.

The state is plain data and an old one stays valid, so a run can be replayed, resumed and tested without an optimiser::

    grams = {"theta": gram_matrix(...), "phi": gram_matrix(...)}  # the J gradients at strata.random_step(seed, k)
    state = update(state, look(step, k, strata.bounds(k), grams))
    summary(state).gradient_norm_sq["total"]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from bbvi_conv.monitor.gradient_norm import SquaredNorm, ends, squared_norm, total_gram
from bbvi_conv.monitor.intervals import Estimate, student_quantile, unavailable
from bbvi_conv.monitor.rate import Rate, rates
from bbvi_conv.monitor.series import Array, Series
from bbvi_conv.monitor.strata import running_mean
from bbvi_conv.program.program import GROUPS

FIGURES = (*GROUPS, "total")
LATEST = 5
"""Looks that :func:`signal_to_noise` pools."""
THIS_RUN = "this run"
CONDITIONAL = "this run, conditional on the minibatch"

_NORM_COLUMNS = {
    "gradient_norm_sq_{}": "value",
    "gradient_norm_sq_{}_low": "low",
    "gradient_norm_sq_{}_high": "high",
    "trace_sigma_{}": "trace_sigma",
    "trace_sigma_sq_{}": "trace_sigma_sq",
    "noise_scale_{}": "noise_scale",
    "mean_norm_sq_biased_{}": "mean_norm_sq_biased",
}
_NOISE_COLUMN, _SNR_COLUMN = "training_trace_sigma_{}", "snr_{}"
_MEAN_COLUMNS = ("running_mean_{}", "running_mean_{}_low", "running_mean_{}_high")
_HELD_OUT = "held_out_"
_OWN_COLUMNS = ("step", "stratum", "stratum_start", "stratum_length", "num_gradients", "bound", "bound_error")
_HELD_OUT_COLUMNS = ("bound", "bound_error", *(name.format(figure) for figure in FIGURES for name in _NORM_COLUMNS))


class Look(NamedTuple):
    """One random iterate: where it was drawn and what J gradients there said; a group without parameters is None.

    Attributes:
        step: the step looked at, inside its stratum.
        stratum: index of the stratum.
        start, length: its first step and number of steps.
        theta, phi, shared, total: squared gradient norms of the generative, the variational and the shared parameters,
            and of all of them.
        bound, bound_error: an estimate of the bound at this step and its standard error, where one was made.
        noise: trace of the covariance of one gradient by the estimator that trains, for each figure; the norms are
            looked at by the quietest estimator of the same gradient.
        held_out: norms and bound at the same step over held-out rows; None where there are none, or where a loss or
            gradient on them was not finite.
    """

    step: int
    stratum: int
    start: int
    length: int
    theta: SquaredNorm | None
    phi: SquaredNorm | None
    shared: SquaredNorm | None
    total: SquaredNorm
    bound: float | None = None
    bound_error: float | None = None
    noise: Mapping[str, float] = {}
    held_out: Look | None = None

    def norm(self, figure: str) -> SquaredNorm | None:
        """The squared norm called ``figure``, one of :data:`FIGURES`."""
        return {"theta": self.theta, "phi": self.phi, "shared": self.shared, "total": self.total}[figure]

    def signal_to_noise(self, figure: str) -> float | None:
        """Root of U / tr Sigma of one gradient that trains, 0 where U is negative; None where there is no noise."""
        norm, noise = self.norm(figure), self.noise.get(figure, 0.0)
        return None if norm is None or noise <= 0.0 else math.sqrt(max(norm.value, 0.0) / noise)


class MonitorState(NamedTuple):
    """All looks of a run, in order.

    Attributes:
        looks: one per stratum.
        label: what the figures are about; goes wherever they go.
        judges_held_out: whether looks are at held-out rows as well.
    """

    looks: tuple[Look, ...] = ()
    label: str = THIS_RUN
    judges_held_out: bool = False

    @property
    def held_out(self) -> MonitorState:
        """The looks at held-out rows as those of a run of their own; up to the first that was not finite."""
        found = itertools.takewhile(lambda one: one is not None, (entry.held_out for entry in self.looks))
        return MonitorState(tuple(one for one in found if one is not None), f"{self.label}, held-out rows")


class Summary(NamedTuple):
    """The figures of a run.

    Attributes:
        label: what they are about.
        looks: number of looks.
        steps: steps the strata cover.
        gradient_norm_sq: for each of :data:`FIGURES`, the mean over a uniformly random step of the run.
        latest: for each of them, U at the last look.
        rate: rates and plateau test of the total.
    """

    label: str
    looks: int
    steps: int
    gradient_norm_sq: dict[str, Estimate]
    latest: dict[str, Estimate]
    rate: Rate

    def to_json(self) -> dict[str, object]:
        """Plain values, for a JSON file."""
        return {
            "label": self.label,
            "looks": self.looks,
            "steps": self.steps,
            "gradient_norm_sq": {name: figure.to_json() for name, figure in self.gradient_norm_sq.items()},
            "latest": {name: figure.to_json() for name, figure in self.latest.items()},
            "rate": self.rate.to_json(),
        }


def look(
    step: int,
    stratum: int,
    bounds: tuple[int, int],
    grams: Mapping[str, Tensor],
    *,
    bound: float | None = None,
    bound_error: float | None = None,
    noise: Mapping[str, float] | None = None,
    level: float = 0.95,
) -> Look:
    """A :class:`Look` from the Gram matrices of the groups at one step.

    Args:
        step: the step looked at.
        stratum: index of its stratum.
        bounds: first step of the stratum and the first one after it.
        grams: Gram matrix ``(J, J)`` of each group that has parameters, keyed theta, phi, shared.
        bound, bound_error: an estimate of the bound there and its standard error.
        noise: trace of the covariance of one gradient by the estimator that trains, by group; None: that of ``grams``.
        level: coverage of the intervals.
    Raises:
        ValueError: if a group is unknown, ``step`` is outside ``bounds``, or a Gram matrix is unusable.
    """
    unknown = sorted(set(grams) - set(GROUPS))
    if unknown:
        raise ValueError(f"unknown parameter groups {unknown}: the groups are {', '.join(GROUPS)}")
    if not bounds[0] <= step < bounds[1]:
        raise ValueError(f"step {step} is not in stratum {stratum}, which holds steps {bounds[0]} to {bounds[1] - 1}")
    norms = {name: squared_norm(grams[name], level) if name in grams else None for name in GROUPS}
    traces = {name: norm.trace_sigma for name, norm in norms.items() if norm is not None} if noise is None else noise
    return Look(
        step,
        stratum,
        bounds[0],
        bounds[1] - bounds[0],
        norms["theta"],
        norms["phi"],
        norms["shared"],
        squared_norm(total_gram(grams), level) if len(grams) != 1 else next(n for n in norms.values() if n),
        bound=bound,
        bound_error=bound_error,
        noise={**traces, "total": sum(traces.values())},
    )


def update(state: MonitorState, new: Look) -> MonitorState:
    """The state with one look more; ``state`` itself is left as it was.

    Raises:
        ValueError: if ``new`` is not the look of the stratum that comes next: a gap would bias the running mean.
    """
    index = len(state.looks)
    start = state.looks[-1].start + state.looks[-1].length if state.looks else 0
    if new.stratum != index or new.start != start:
        raise ValueError(
            f"expected the look of stratum {index}, starting at step {start}, got stratum {new.stratum} starting at "
            f"step {new.start}: looks must come in order and without a gap"
        )
    return state._replace(looks=(*state.looks, new))


def series(state: MonitorState, figure: str = "total", *, steps: int | None = None) -> Series | None:
    """The looks as arrays; None where the figure has no parameters or there is no look.

    Args:
        figure: one of :data:`FIGURES`.
        steps: steps the run made. Where it ended inside the last stratum, that one counts with the steps it made: given
            that its look fell among them, the look was uniform on them.
    Raises:
        ValueError: if ``figure`` is unknown, or ``steps`` is not past the last look.
    """
    if figure not in FIGURES:
        raise ValueError(f"unknown figure {figure!r}: choose one of {', '.join(FIGURES)}")
    norms = [norm for entry in state.looks if (norm := entry.norm(figure)) is not None]
    if not norms or len(norms) != len(state.looks):
        return None
    lengths = [entry.length for entry in state.looks]
    last = state.looks[-1]
    if steps is not None:
        if steps <= last.step:
            raise ValueError(f"steps must be past the last look at step {last.step}, got {steps}")
        lengths[-1] = min(last.length, steps - last.start)
    return Series(
        steps=_array(entry.step for entry in state.looks),
        lengths=_array(lengths),
        values=_array(norm.value for norm in norms),
        slopes=_array(norm.variance_slope for norm in norms),
        floors=_array(norm.variance_floor for norm in norms),
    )


def summary(state: MonitorState, *, steps: int | None = None, level: float = 0.95) -> Summary:
    """The figures of the run so far; ``steps`` as in :func:`series`."""
    runs = {name: series(state, name, steps=steps) for name in FIGURES}
    whole = runs["total"]
    covered = 0 if whole is None else int(whole.lengths.sum())
    means = {name: no_figure(state, name) if run is None else running_mean(run, level) for name, run in runs.items()}
    latest = {name: _latest(state, name) for name in FIGURES}
    nothing = Series(*(np.empty(0) for _ in Series._fields))
    return Summary(
        state.label, len(state.looks), covered, means, latest, rates(nothing if whole is None else whole, level)
    )


def signal_to_noise(state: MonitorState, figure: str, *, level: float = 0.95) -> Estimate:
    r""":math:`\sqrt{U / \operatorname{tr}\Sigma}` of one gradient that trains, over the last :data:`LATEST` looks.

    U and the trace are means over those looks; the interval is that of U, by the quietest estimator.
    """
    latest = [(norm, entry.noise.get(figure, 0.0)) for entry in state.looks[-LATEST:] if (norm := entry.norm(figure))]
    if not latest:
        return no_figure(state, figure)
    count = len(latest)
    trace = sum(noise for _, noise in latest) / count
    if trace <= 0.0:
        return unavailable("the estimator has no noise: its signal-to-noise ratio is infinite")
    value = sum(norm.value for norm, _ in latest) / count
    slope = sum(norm.variance_slope for norm, _ in latest) / count**2
    floor = sum(norm.variance_floor for norm, _ in latest) / count**2
    degrees = sum(norm.num_gradients - 1 for norm, _ in latest)
    low, high = ends(value, slope, floor, student_quantile(level, degrees))
    value, low, high = (math.sqrt(max(u, 0.0) / trace) for u in (value, low, high))
    return Estimate(value, low, high)


def columns(*, held_out: bool = False) -> list[str]:
    """Names of the columns of :func:`to_rows`; those about held-out rows, where there are any, stand last."""
    by_figure = (*_NORM_COLUMNS, _NOISE_COLUMN, _SNR_COLUMN, *_MEAN_COLUMNS)
    own = [*_OWN_COLUMNS, *(name.format(figure) for figure in FIGURES for name in by_figure)]
    return own + [_HELD_OUT + name for name in _HELD_OUT_COLUMNS] if held_out else own


def to_rows(state: MonitorState, *, since: int = 0, level: float = 0.95) -> list[list[float | int | None]]:
    """One row per look from look ``since`` on, in the order of :func:`columns`; None where there is no number.

    There are columns about held-out rows where ``state.judges_held_out``.

    Floats go through ``repr`` unharmed, so :func:`from_rows` gives back the same state. The running means are those up
    to each look.
    """
    return [_row(state._replace(looks=state.looks[: count + 1]), level) for count in range(since, len(state.looks))]


def from_rows(
    header: Sequence[str], rows: Iterable[Sequence[str | float | int | None]], *, label: str = THIS_RUN
) -> MonitorState:
    """The state that :func:`to_rows` wrote; cells may be the strings of a CSV file, empty where there is no number.

    Raises:
        ValueError: if a column is missing, a row is cut short, a cell is no number, or looks are missing.
    """
    missing = [name for name in columns() if name not in header]
    if missing:
        raise ValueError(f"the monitor's table lacks the columns {missing}: it was not written by this version")
    state = MonitorState(label=label, judges_held_out=set(columns(held_out=True)).issubset(header))
    for index, cells in enumerate(rows):
        if len(cells) != len(header):
            raise ValueError(f"row {index} of the monitor's table has {len(cells)} cells, not {len(header)}: delete it")
        try:
            named = dict(zip(header, cells, strict=True))
            state = update(state, _parse(named, held_out=state.judges_held_out))
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {index} of the monitor's table cannot be read: {error}") from error
    return state


def _array(values: Iterable[float]) -> Array:
    return np.array(list(values), dtype=np.float64)


def no_figure(state: MonitorState, name: str) -> Estimate:
    """Why there is no figure of that name."""
    if not state.looks:
        return unavailable("no look has been taken yet: run more steps")
    return unavailable(f"the model and guide have no {name} parameters")


def _latest(state: MonitorState, name: str) -> Estimate:
    norm = state.looks[-1].norm(name) if state.looks else None
    return no_figure(state, name) if norm is None else norm.estimate


def _row(state: MonitorState, level: float) -> list[float | int | None]:
    """Row of the last look of ``state``."""
    entry = state.looks[-1]
    row: list[float | int | None] = [entry.step, entry.stratum, entry.start, entry.length, entry.total.num_gradients]
    row += [entry.bound, entry.bound_error]
    for figure in FIGURES:
        norm, run = entry.norm(figure), series(state, figure)
        row += [None if norm is None else getattr(norm, field) for field in _NORM_COLUMNS.values()]
        row += [entry.noise.get(figure), entry.signal_to_noise(figure)]
        row += [None, None, None] if run is None else list(running_mean(run, level)[:3])
    return row + _held_out_row(entry.held_out) if state.judges_held_out else row


def _held_out_row(entry: Look | None) -> list[float | int | None]:
    if entry is None:
        return [None] * len(_HELD_OUT_COLUMNS)
    norms = [(entry.norm(figure), field) for figure in FIGURES for field in _NORM_COLUMNS.values()]
    return [entry.bound, entry.bound_error, *(None if norm is None else getattr(norm, field) for norm, field in norms)]


def _parse(cells: Mapping[str, str | float | int | None], *, held_out: bool = False) -> Look:
    """The look of a row; with ``held_out`` that at held-out rows too."""

    def number(name: str) -> float | None:
        cell = cells[name]
        return None if cell is None or cell == "" else float(cell)

    def whole(name: str) -> int:
        cell = cells[name]
        if cell is None:
            raise ValueError(f"{name} is empty")
        return int(cell)

    def norm(figure: str, head: str = "") -> SquaredNorm | None:
        fields = {field: number(head + name.format(figure)) for name, field in _NORM_COLUMNS.items()}
        present = {field: value for field, value in fields.items() if value is not None}
        if present and len(present) != len(fields):
            raise ValueError(f"some columns of {head}{figure} are empty and some are not")
        return SquaredNorm(**present, num_gradients=whole("num_gradients")) if present else None

    def entry(head: str, noise: Mapping[str, float]) -> Look | None:
        total = norm("total", head)
        if total is None:
            return None
        place = whole("step"), whole("stratum"), whole("stratum_start"), whole("stratum_length")
        groups = norm("theta", head), norm("phi", head), norm("shared", head)
        return Look(*place, *groups, total, number(f"{head}bound"), number(f"{head}bound_error"), noise)

    noise = {figure: number(_NOISE_COLUMN.format(figure)) for figure in FIGURES}
    found = entry("", {figure: trace for figure, trace in noise.items() if trace is not None})
    if found is None:
        raise ValueError("gradient_norm_sq_total is empty")
    return found._replace(held_out=entry(_HELD_OUT, {})) if held_out else found
