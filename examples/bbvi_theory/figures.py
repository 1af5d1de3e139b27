"""The pictures of the study. Made with matplotlib's objects; no global state is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bbvi_conv.monitor.series import Array
from bbvi_conv.monitor.strata import Strata, running_means

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C8C8C", "#000000")
"""Okabe and Ito (2008), told apart by colour-blind readers."""


def falls(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """One panel for every quantity measured: means over seeds against the step, guides of the expected slope."""
    quantities = list(dict.fromkeys(_panel(row) for row in rows))
    columns = min(3, len(quantities))
    lines = -(-len(quantities) // columns)
    figure = Figure(figsize=(6.6 * columns, 5.4 * lines), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[len(quantities) :]:
        axis.remove()
    for axis, quantity in zip(axes, quantities, strict=False):
        shown = [row for row in rows if _panel(row) == quantity]
        for row, colour in zip(shown, _cycle(len(shown)), strict=True):
            _line(axis, row, colour)
        geometric = quantity.startswith("geometric")
        if any(len(line.get_xdata()) for line in axis.get_lines()):  # else every run diverged: no scale without numbers
            axis.set_yscale("log")
            axis.set_xscale("linear" if geometric else "log")
        if not geometric:
            _guide(axis, shown[0])
        axis.set_title(quantity)
        axis.set_xlabel("step n")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.25)
    return figure


def _panel(row: dict[str, Any]) -> str:
    return f"geometric: {row['quantity']}" if row["expected_slope"] == "geometric" else str(row["quantity"])


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _line(axis: Axes, row: dict[str, Any], colour: str) -> None:
    curves = [(np.array(n), np.array(v, dtype=float)) for n, v in row["curves"]]
    label = f"{row['family']}, {row['parameterisation']}, {row['estimator']}, {row['optimiser']}"
    if "diverged" in row["outcomes"]:
        axis.plot([], [], color=colour, label=f"{label}: diverged")
        return
    if row["quantity"].startswith("E||"):
        curves = [_running(values) for _, values in curves]
    steps = np.unique(np.concatenate([n for n, _ in curves]))
    steps = steps[steps > 0]
    each = [np.interp(steps, n, v) for n, v in curves]
    mean = np.mean(each, axis=0)
    use = mean > 1e-14
    axis.plot(steps[use], mean[use], color=colour, linewidth=1.2, label=label)


def _running(values: Array) -> tuple[Array, Array]:
    """Mean over a uniformly random step up to the end of each stratum: what the theorem bounds, and hardly negative."""
    ends = np.array([Strata().bounds(index)[1] for index in range(len(values))], dtype=float)
    return ends, running_means(np.diff(ends, prepend=0.0), values)


def _guide(axis: Axes, row: dict[str, Any]) -> None:
    slope = row["expected_slope"]
    lines = axis.get_lines()
    if not isinstance(slope, int | float) or not lines:
        return
    x, y = (np.asarray(part, dtype=float) for part in lines[0].get_data())
    if len(x):
        middle = len(x) // 2
        axis.plot(x, y[middle] * (x / x[middle]) ** slope, "k--", linewidth=1, label=f"slope {slope:g}")


def shares(found: dict[str, Any]) -> Figure:
    """Share of runs that went wrong, with and without care for the scale."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    names = list(found["share"])
    for kind, colour, offset in (("nonpositive", COLOURS[1], -0.2), ("jump", COLOURS[0], 0.2)):
        heights = [np.mean([run[kind] for run in found["runs"][name]]) for name in names]
        label = {"nonpositive": "a scale at or below zero", "jump": "a jump above 10 standard deviations"}[kind]
        axis.bar(np.arange(len(names)) + offset, heights, 0.38, color=colour, label=label)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel(f"share of {found['targets']} Gaussian targets")
    axis.set_title("linear scale, step 1 / L, start at 0.01 (proj-SGD: at its floor)")
    axis.legend(fontsize=8)
    return figure
