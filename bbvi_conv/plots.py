"""Figures of a fit: gradient norm, bound, gap, rate. Made with matplotlib's objects; no global state is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bbvi_conv import decoded
from bbvi_conv.monitor.gradient_norm import ends as norm_ends
from bbvi_conv.monitor.intervals import Estimate, student_quantile
from bbvi_conv.monitor.rate import envelope, envelope_constant, rates
from bbvi_conv.monitor.seeds import common, expected_norm, mean_series
from bbvi_conv.monitor.series import Array, Series
from bbvi_conv.monitor.state import MonitorState, series
from bbvi_conv.monitor.strata import running_mean, running_means
from bbvi_conv.program.program import GROUPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bbvi_conv.fitting import Fit

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C8C8C"
"""Okabe and Ito (2008), told apart by colour-blind readers."""
DPI = 150
FEW_DECADES = 100.0
"""Ratio of the ends of a logarithmic axis up to which a tick a decade would be too few."""
CHECKED = "check, at the returned parameters"
_TITLES = {"total": "all parameters", "theta": "generative (theta)", "phi": "variational (phi)", "shared": "shared"}


def plot(fit: Fit, kind: str) -> Figure:
    """A figure of a fit.

    Args:
        fit: the fit, finished or not.
        kind: ``gradient_norm``: squared gradient norm at random iterates, its running mean and the theorem's envelope;
            ``bound``: the bound along the run; ``gap``: the three distances of every check and the tolerance;
            ``rate``: running mean over envelope, and the exponent of the norm itself; and of a model that decodes the
            latents of single data ``latents``, ``reconstructions``, ``samples``, ``traversals``: see
            :mod:`bbvi_conv.decoded`.

    Raises:
        ValueError: if ``kind`` is unknown, or the fit has none of it.
    """
    kinds = KINDS | OF_LATENTS
    if kind not in kinds:
        raise ValueError(f"unknown kind of plot {kind!r}; choose one of {', '.join(kinds)}")
    return kinds[kind](fit)


def gradient_norm(fit: Fit) -> Figure:
    """Running mean of U with its interval, U at every look, and the envelope; theta and phi apart where both are.

    With several seeds U is averaged over them, and a thin line is the running mean of one. Another is that on held-out
    rows, where there are any.
    """
    monitors = _monitors(fit)
    present = [group for group in GROUPS if series(monitors[0], group) is not None]
    panels = ["total", *present] if len(present) > 1 else ["total"]
    figure, axes = _figure(len(panels))
    for axis, name in zip(axes, panels, strict=True):
        run = _series(monitors, name)
        if run is None:
            _empty(axis, "no look has been taken yet: run more steps")
            continue
        _norm_panel(axis, monitors, name, run)
        if len(panels) > 1:
            axis.set_title(_TITLES[name])
        axis.set_xlabel("optimiser step")
    axes[0].set_ylabel(f"squared gradient norm, nats²{_per(fit, squared=True)}")
    _few_ticks(*axes)
    _legend_below(figure, axes[0])
    over = monitors[0].label if len(monitors) == 1 else f"over {len(monitors)} seeds"
    figure.suptitle(f"Squared gradient norm at random iterates ({over})")
    return figure


def bound(fit: Fit) -> Figure:
    """The bound over steps, whole run and its second half, with the intervals of the checks.

    With several seeds the line is their mean and the band their range. Where there are held-out rows, a second line is
    the bound on them at every look, its band the 95% interval.
    """
    figure, axes = _figure(2)
    seeds, per = fit.state.seeds, fit.run.normaliser
    chunks: dict[tuple[int, int], list[float]] = {}
    for one in seeds:
        for begin, steps, loss in one.losses:
            chunks.setdefault((begin, steps), []).append(-loss)
    if not chunks:
        for axis in axes:
            _empty(axis, "no step has been made yet")
        return figure
    first, count = np.array(sorted(chunks), dtype=float).T
    middle = first + count / 2
    rows = [chunks[key] for key in sorted(chunks)]
    values, low, high = (np.array([float(of(row)) for row in rows]) for of in (np.mean, np.min, np.max))
    checks = [(c.step, _divided(c.bound, per)) for one in seeds for c in one.checks if c.bound.available]
    unseen = _held_out_bounds([one.monitor.held_out for one in seeds])
    on = ", on held-out rows" if fit.run.held_out is not None else ""
    last = float(first[-1] + count[-1])
    of_seeds = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
    for axis, start, title in ((axes[0], 0.0, "whole run"), (axes[1], last / 2, "second half")):
        shown = middle >= start
        label = f"training, mean of each chunk of steps{of_seeds}"
        axis.plot(middle[shown], values[shown], color=BLUE, lw=0.8, label=label)
        if len(seeds) > 1:
            axis.fill_between(
                middle[shown], low[shown], high[shown], color=BLUE, alpha=0.15, lw=0, label="range of the seeds"
            )
        late = unseen[:, unseen[0] >= start]
        if late.size:
            axis.plot(late[0], late[1], color=GREEN, lw=1.2, label=f"held-out rows, at every look{of_seeds}")
            axis.fill_between(late[0], late[1] - late[2], late[1] + late[2], color=GREEN, alpha=0.2, lw=0)
        shown_checks = [(s, e) for s, e in checks if s >= start]
        _intervals(axis, shown_checks, ORANGE, "o", f"check{on}, at the newest parameters" if on else CHECKED)
        axis.set_title(title)
        axis.set_xlabel("optimiser step")
        axis.ticklabel_format(axis="y", useOffset=False)
    axes[0].set_xscale("log")
    axes[1].locator_params(axis="x", nbins=5)
    axes[1].xaxis.set_major_formatter("{x:,.0f}")
    axes[0].set_ylabel(f"bound, nats{_per(fit)}")
    _few_ticks(*axes)
    _legend_below(figure, axes[1])
    figure.suptitle(f"Bound: {type(fit.settings.bound()).__name__}")
    return figure


def _held_out_bounds(monitors: Sequence[MonitorState]) -> Array:
    """Step, mean bound of the seeds on held-out rows and half its 95% interval, at the looks that all have: (3, L)."""
    looks = list(zip(*(monitor.looks for monitor in common(monitors)), strict=True))
    rows = [[(e.bound, e.bound_error) for e in of_seeds if e.bound is not None] for of_seeds in looks]
    values = np.array(rows, dtype=float).reshape(len(looks), len(monitors), 2)
    error = 1.96 * np.sqrt((values[..., 1] ** 2).sum(1)) / len(monitors)
    return np.array([[of_seeds[0].step for of_seeds in looks], values[..., 0].mean(1), error], dtype=float)


def gap(fit: Fit) -> Figure:
    """Remaining gap, natural-gradient norm and paired improvement at every check, against the tolerance.

    With several seeds those of the best, and the gaps of the others as thin lines.
    """
    figure, (axis,) = _figure(1)
    seeds = fit.state.seeds
    best = fit.best if len(seeds) > 1 else 0
    checks = seeds[best].checks
    if not checks:
        _empty(axis, "no check has been made yet: run more steps")
        return figure
    parts: list[tuple[str, Callable[[Any], Estimate], str, str]] = [
        ("remaining gap", lambda c: c.gap, BLUE, "o"),
        ("natural-gradient norm", lambda c: c.natural, GREEN, "s"),
        ("paired improvement over the last window", lambda c: c.improvement, ORANGE, "^"),
    ]
    missing, numbers = [], [fit.settings.tol]
    for index, (name, of, colour, marker) in enumerate(parts):
        points = [(c.step * 1.05 ** (index - 1), of(c)) for c in checks]
        found = [(s, e) for s, e in points if e.available]
        _intervals(axis, found, colour, marker, name, joined=True)
        numbers += [abs(v) for _, e in found for v in e[:3] if isinstance(v, float)]
        absent = [c for c in checks if not of(c).available]
        if absent:
            steps = ", ".join(str(c.step) for c in absent)
            missing.append(f"{name}: not available at {steps} ({of(absent[-1]).reason})")
            at = [step for step, estimate in points if not estimate.available]
            transform, label = axis.get_xaxis_transform(), f"{name}: not available"
            axis.plot(at, [0.03] * len(at), "x", color=colour, transform=transform, ms=7, label=label)
    for index, one in enumerate(seeds):
        gaps = [(c.step, c.gap.value) for c in one.checks if c.gap.value is not None]
        if index != best and gaps:
            numbers += [abs(value) for _, value in gaps]
            first = index == (0 if best else 1)
            label = "remaining gap of the other seeds" if first else "_"
            axis.plot(*zip(*gaps, strict=True), color=GREY, lw=0.8, marker=".", ms=3, zorder=1, label=label)
    tol = fit.settings.tol
    axis.axhline(tol, color="black", ls="--", lw=1, label=f"tolerance {tol:g} nats")
    axis.axhline(0.0, color=GREY, lw=0.6)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=tol)
    _few_ticks(axis)
    _step_ticks(axis, sorted({c.step for one in seeds for c in one.checks}))
    top = 10 ** math.ceil(math.log10(2.0 * max(numbers)))
    low = min([0.0, *(float(e.low) for c in checks for _, of, _, _ in parts if (e := of(c)).low is not None)])
    axis.set_ylim(min(-tol, 2.0 * low), top)
    axis.set_xlabel("optimiser step of the check")
    axis.set_ylabel("nats (linear below the tolerance)")
    _legend_below(figure, axis)
    of_best = f", seed {fit.settings.seed + best}, the best of {len(seeds)}" if len(seeds) > 1 else ""
    figure.suptitle(f"Distance from the optimum at every check{of_best}")
    if missing:
        width = int(figure.get_figwidth() * 15)
        lines = "\n".join(_wrapped(sentence, width) for sentence in missing)
        axis.set_xlabel(f"{axis.get_xlabel()}\n{lines}", fontsize=8)
        figure.set_figheight(figure.get_figheight() + 0.17 * (lines.count("\n") + 1 + len(missing)))
    return figure


def rate(fit: Fit) -> Figure:
    """Running mean over the theorem's envelope with its slope, and the exponent of U with the plateau test."""
    figure, (left, right) = _figure(2)
    monitors = _monitors(fit)
    run = _series(monitors, "total")
    if run is None:
        for axis in (left, right):
            _empty(axis, "no look has been taken yet: run more steps")
        return figure
    found = rates(run)
    constant = envelope_constant(run)
    if constant is None:
        _empty(left, "the running mean is not positive: the envelope cannot be placed")
    else:
        _ratio_panel(left, run, constant, found.envelope_slope, found.window)
    _points(right, run, _bounds_of(monitors, "total", run))
    _power_law(right, run, found.exponent, found.window, BLUE, "exponent of the last 1.5 decades")
    if found.plateau.window != found.window:
        _power_law(
            right, run, found.plateau.exponent, found.plateau.window, GREEN, "exponent of the plateau test's window"
        )
    right.set_title(f"norm itself: {found.plateau.trend}", fontsize=10)
    right.set_xlabel("optimiser step")
    right.set_ylabel(f"squared norm, nats²{_per(fit, squared=True)}")
    _few_ticks(left, right)
    _legend_below(figure, left, right)
    figure.suptitle(f"How fast the squared gradient norm falls\n{_wrapped(found.plateau.reason, 110)}", fontsize=10)
    return figure


KINDS: dict[str, Callable[[Any], Figure]] = {
    "gradient_norm": gradient_norm,
    "bound": bound,
    "gap": gap,
    "rate": rate,
}
"""Figures of the course of a run."""
OF_LATENTS: dict[str, Callable[[Any], Figure]] = {
    "reconstructions": decoded.reconstructions,
    "samples": decoded.samples,
    "traversals": decoded.traversals,
    "latents": decoded.latents,
}
"""Figures of what a model makes of the latents of single data, where it has any."""


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 if columns == 1 else 2.8 + 3.1 * columns, 4.4), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.grid(True, which="major", color="#E4E4E4", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _monitors(fit: Fit) -> list[MonitorState]:
    """The looks that all seeds have which met no value that was not finite."""
    return common(
        [one.monitor for one in fit.state.seeds if not one.frozen] or [one.monitor for one in fit.state.seeds]
    )


def _series(monitors: Sequence[MonitorState], name: str) -> Series | None:
    return series(monitors[0], name) if len(monitors) == 1 else mean_series(monitors, name)


def _until(run: Series, count: int) -> Series:
    return Series(*(column[:count] for column in run))


def _norm_panel(axis: Axes, monitors: Sequence[MonitorState], name: str, run: Series) -> None:
    _points(axis, run, _bounds_of(monitors, name, run))
    means = running_means(run.lengths, run.values)
    of_seeds = [one for monitor in monitors if (one := series(monitor, name)) is not None]
    counts = range(1, len(means) + 1)
    if len(of_seeds) == 1:
        ends = [running_mean(_until(run, k)) for k in counts]
    else:
        ends = [expected_norm([_until(one, k) for one in of_seeds], _until(run, k)) for k in counts]
        for index, one in enumerate(of_seeds):
            own = running_means(one.lengths, one.values)
            label = "running mean of one seed" if index == 0 else "_"
            axis.plot(one.stops[own > 0], own[own > 0], color=BLUE, lw=0.5, alpha=0.5, label=label)
    _held_out_norm(axis, [monitor.held_out for monitor in monitors], name)
    positive = means > 0
    band = np.array([[e.low if e.low is not None else np.nan, e.high if e.high is not None else np.nan] for e in ends])
    bottom = axis.get_ylim()[0]
    axis.plot(run.stops[positive], means[positive], color=BLUE, lw=1.8, label="running mean, 95% interval")
    axis.fill_between(run.stops, np.maximum(band[:, 0], bottom), band[:, 1], color=BLUE, alpha=0.15, lw=0)
    constant = envelope_constant(run)
    if constant is not None:
        late = run.stops[run.stops > math.e**2]
        axis.plot(late, envelope(late, constant), color=ORANGE, ls="--", lw=1.4, label="envelope C log n / √n")
    top = float(np.nanmax([*means[positive], *run.values, np.nan])) if positive.any() else axis.get_ylim()[1]
    axis.set_ylim(bottom, 5.0 * top)


def _held_out_norm(axis: Axes, monitors: Sequence[MonitorState], name: str) -> None:
    """The running mean of U on held-out rows, up to the first look that was not finite there."""
    run = _series(common(monitors), name)
    if run is None:
        return
    means = running_means(run.lengths, run.values)
    axis.plot(run.stops[means > 0], means[means > 0], color=GREEN, lw=0.8, label="running mean on held-out rows")


def _points(axis: Axes, run: Series, ends: Array) -> None:
    """U at every look with its interval, on logarithmic axes; what is below zero stands at the bottom."""
    above = run.values > 0
    axis.set_xscale("log")
    axis.set_yscale("log")
    if not above.any():
        axis.set_ylim(1e-3, 1.0)
    else:
        bottom = 0.3 * float(run.values[above].min())
        axis.set_ylim(bottom, 3.0 * float(np.nanmax(ends)))
    bottom = axis.get_ylim()[0]
    axis.set_xlim(0.8, 1.3 * float(run.stops[-1]))
    steps = run.steps + 1.0
    if above.any():
        low = run.values[above] - np.maximum(ends[above, 0], bottom)
        errors = np.array([np.maximum(low, 0.0), np.maximum(ends[above, 1] - run.values[above], 0.0)])
        axis.errorbar(
            steps[above], run.values[above], errors, fmt="o", ms=2.5, color=GREY, elinewidth=0.6, alpha=0.8, zorder=1,
            label="U at a random step, 95% interval",
        )  # fmt: skip
    if (~above).any():
        axis.vlines(steps[~above], bottom, ends[~above, 1], color=GREY, lw=0.6, alpha=0.8)
        axis.plot(
            steps[~above], np.full(int((~above).sum()), 1.15 * bottom), "v", ms=4, color=PINK, clip_on=False,
            label="U below 0 (noise)",
        )  # fmt: skip


def _bounds_of(monitors: Sequence[MonitorState], name: str, run: Series) -> Array:
    """Interval of U at every look, or of its mean over seeds."""
    norms = [norm for look in monitors[0].looks if (norm := look.norm(name)) is not None]
    if len(monitors) == 1:
        return np.array([[norm.low, norm.high] for norm in norms], dtype=float)
    quantile = student_quantile(0.95, len(monitors) * (norms[0].num_gradients - 1))
    looks = zip(run.values.tolist(), run.slopes.tolist(), run.floors.tolist(), strict=True)
    return np.array([norm_ends(u, slope, floor, quantile) for u, slope, floor in looks], dtype=float)


def _ratio_panel(axis: Axes, run: Series, constant: float, slope: Estimate, window: tuple[int, int] | None) -> None:
    stops, means = run.stops, running_means(run.lengths, run.values)
    usable = (stops > math.e**2) & (means > 0)
    ratio = means[usable] / envelope(stops[usable], constant)
    axis.plot(stops[usable], ratio, color=BLUE, lw=1.6, label="running mean / envelope")
    axis.axhline(1.0, color=GREY, lw=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    if slope.value is not None and window is not None:
        late = stops[usable] >= window[0]
        n, y = stops[usable][late], ratio[late]
        offsets = np.log(y) - slope.value * np.log(n)
        middle = math.exp(float(np.average(offsets, weights=np.gradient(np.log(n)))))
        label = f"slope {slope.value:.2f} [{slope.low:.2f}, {slope.high:.2f}]"
        axis.plot(n, middle * n**slope.value, color=ORANGE, ls="--", lw=1.6, label=label)
        axis.axvspan(n[0], n[-1], color=ORANGE, alpha=0.06, lw=0)
    else:
        axis.text(0.03, 0.03, _wrapped(f"no slope: {slope.reason}", 52), transform=axis.transAxes, fontsize=8)
    axis.set_title("running mean over C log n / √n (claim: slope ≤ 0)", fontsize=10)
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("ratio")


def _power_law(
    axis: Axes, run: Series, exponent: Estimate, window: tuple[int, int] | None, colour: str, name: str
) -> None:
    if exponent.value is None or window is None:
        return
    inside = (run.steps >= window[0]) & (run.steps <= window[1])
    n = run.steps[inside] + 1.0
    curve = n**exponent.value
    height = float(run.values[inside].mean() / curve.mean())
    if height > 0:
        label = f"{name}, {exponent.value:.2f} [{exponent.low:.2f}, {exponent.high:.2f}]"
        axis.plot(n, height * curve, color=colour, lw=1.6, ls="--", label=label)


def _intervals(
    axis: Axes, points: Sequence[tuple[float, Estimate]], colour: str, marker: str, label: str, *, joined: bool = False
) -> None:
    if not points:
        return
    steps = [step for step, _ in points]
    values = np.array([e.value for _, e in points], dtype=float)
    ends = np.array([[e.low, e.high] for _, e in points], dtype=float)
    errors = np.maximum(np.array([values - ends[:, 0], ends[:, 1] - values]), 0.0)
    style = f"{marker}-" if joined else marker
    axis.errorbar(steps, values, errors, fmt=style, ms=5, lw=0.8, color=colour, capsize=2, label=label)


def _step_ticks(axis: Axes, steps: Sequence[int]) -> None:
    axis.set_xticks(list(steps), [f"{step:,}" for step in steps])
    axis.minorticks_off()


def _few_ticks(*axes: Axes) -> None:
    """On logarithmic axes one tick a decade, or where few decades are shown three, all with labels in plain text.

    The others that matplotlib sets, most without a label, are half of the time that the figures of a fit take, and
    reading formulas in labels a fifth of the rest.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, StrMethodFormatter

    for axis in (one for pair in axes for one in (pair.xaxis, pair.yaxis) if one.get_scale() in ("log", "symlog")):
        axis.set_minor_locator(NullLocator())
        low, high = axis.get_view_interval()
        if 0 < high <= FEW_DECADES * low:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        else:
            axis.set_major_formatter(FuncFormatter(_power_of_ten))


def _power_of_ten(x: float, position: int | None = None) -> str:
    """A label such as 10⁻³, or the number itself where it is no power of ten.

    Example:
        >>> _power_of_ten(0.001), _power_of_ten(-10.0), _power_of_ten(0.0), _power_of_ten(20.0)
        ('10⁻³', '-10¹', '0', '20')
    """
    exponent = round(math.log10(abs(x))) if x else 0
    if not math.isclose(abs(x), 10.0**exponent):
        return f"{x:g}"
    return f"{'-' if x < 0 else ''}10{str(exponent).translate(_RAISED)}"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _divided(estimate: Estimate, by: float) -> Estimate:
    value, low, high = (None if v is None else v / by for v in estimate[:3])
    return Estimate(value, low, high, estimate.reason)


def _per(fit: Fit, *, squared: bool = False) -> str:
    if fit.run.normaliser == 1.0:
        return ""
    return " per datum²" if squared else " per datum"


def _legend_below(figure: Figure, *axes: Axes) -> None:
    """One legend for all axes, outside them."""
    found = [pair for axis in axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    if found:
        handles, labels = zip(*found, strict=True)
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def _empty(axis: Axes, message: str) -> None:
    axis.text(0.5, 0.5, _wrapped(message, 50), ha="center", va="center", transform=axis.transAxes)
    axis.set_xticks([])
    axis.set_yticks([])


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return textwrap.fill(text, width)
