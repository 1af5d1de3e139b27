"""The pictures of the study. Made with matplotlib's objects; no global state is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bbvi_conv.monitor.intervals import Estimate
from rainforth2018 import snr
from rainforth2018.laboratory import Moments
from rainforth2018.training import Distances

BLUE, ORANGE, GREEN, PINK, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8C8C8C"
"""Okabe and Ito (2008), told apart by colour-blind readers."""
STYLE = {
    "iwae": ("IWAE, K draws", BLUE, "o"),
    "vae": ("VAE, M draws", ORANGE, "s"),
    "dreg": ("IWAE, doubly reparameterised", GREEN, "^"),
    "vr02": ("VR-IWAE 0.2", PINK, "v"),
    "vr05": ("VR-IWAE 0.5", SKY, "D"),
    "vr02_dreg": ("VR-IWAE 0.2, doubly rep.", PINK, "1"),
    "vr05_dreg": ("VR-IWAE 0.5, doubly rep.", SKY, "2"),
    "piwae": ("PIWAE, K = 8 and M draws of it", "black", "x"),
}
LINED = ("iwae", "vae")
"""The two estimators of the paper's own figures: every parameter has a thin line, the others only the aggregate."""
CORRELATED = "All points and curves come from the same draws (the first K or M of each), so they are correlated."
DPI = 130


def panels(count: int, title: str, note: str = CORRELATED) -> tuple[Figure, list[Axes]]:
    """A row of axes under a title, over a note."""
    figure = Figure(figsize=(7.6 * count, 5.2), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    figure.suptitle(title)
    figure.supxlabel(note, fontsize=8, color=GREY)
    return figure, list(axes)


def save(figure: Figure, path: str) -> None:
    """Write a PNG."""
    figure.savefig(path, dpi=DPI)


def snr_panel(axis: Axes, moments: Moments, title: str) -> None:
    """Aggregate SNR of every estimator, thin lines for single parameters, guides of slope +-1/2, the noise floor."""
    lowest = math.inf
    for name in names(moments):
        part = moments.of(name)
        label, colour, marker = _style(name, moments)
        if name in LINED:
            lines = snr.per_parameter(part.total, part.squares, part.per_batch)
            axis.loglog(part.draws, lines, color=colour, linewidth=0.4, alpha=_faint(lines.shape[1]), zorder=1)
        curve = snr.curve(part.draws, part.total, part.norms, part.per_batch)
        low, high = curve.interval()
        shown = curve.value > 0
        dashed = "--" if name.endswith("_dreg") else "-"
        points = curve.x[shown], curve.value[shown]
        axis.loglog(*points, dashed, color=colour, marker=marker, ms=4, label=label, zorder=3)
        lowest = min(lowest, *points[1])
        shown = shown & (low > 0)
        axis.vlines(curve.x[shown], low[shown], high[shown], color=colour, linewidth=1, zorder=2)
        if name == "iwae":
            axis.loglog(curve.x, snr.FLOORS * curve.floor, ":", color=GREY, label="three noise floors (aggregate)")
            reference = curve.value[0]
    guides(axis, moments.ends, reference, (0.5, -0.5) if "dreg" in names(moments) else (0.5,))
    axis.set_ylim(bottom=lowest / 10)  # lines of single parameters that are noise reach any depth
    _label(axis, title, "signal-to-noise ratio")


def dsnr_panel(axis: Axes, moments: Moments, title: str, *, aimed: bool = False) -> None:
    """Mean of ||par|| / ||perp|| with the middle half of single estimates shaded, and a random vector's."""
    size = moments.total.shape[-1]
    for name in names(moments):
        part = moments.of(name)
        label, colour, marker = _style(name, moments)
        ratios = (part.aimed if aimed else part.ratios).numpy()
        dashed = "--" if name.endswith("_dreg") else "-"
        axis.loglog(part.draws, ratios.mean(0), dashed, color=colour, marker=marker, ms=4, label=label, zorder=3)
        if name in LINED:
            low, high = np.quantile(ratios, [0.25, 0.75], axis=0)
            axis.fill_between(part.draws, low, high, color=colour, alpha=0.25, linewidth=0, zorder=1)
    axis.axhline(snr.random_ratio(size), color=GREY, linestyle=":", label="a random vector")
    _label(axis, title, "directional signal-to-noise ratio")


def guides(axis: Axes, draws: Sequence[float], start: float, slopes: Sequence[float]) -> None:
    """Dashed lines of known slope from the first point."""
    x = np.asarray(draws, dtype=float)
    for slope in slopes:
        colour = "black" if slope > 0 else "darkgreen"
        axis.loglog(x, start * (x / x[0]) ** slope, "--", color=colour, linewidth=1, label=f"slope {slope:+.1f}")


def histograms(samples: Mapping[str, Mapping[int, np.ndarray]], note: str) -> Figure:
    """One panel per parameter, one outline per K."""
    figure, axes = panels(len(samples), "Figure 1: distribution of gradient estimates, D = N = 1", note)
    for axis, (title, by_draws) in zip(axes, samples.items(), strict=True):
        everything = np.concatenate(list(by_draws.values()))
        low, high = np.quantile(everything, [0.002, 0.998])
        bins = np.linspace(low, high, 121).tolist()
        for (draws, values), colour in zip(by_draws.items(), (ORANGE, SKY, GREEN, BLUE), strict=False):
            axis.hist(values, bins=bins, density=True, histtype="step", color=colour, label=f"K = {draws}")
            axis.axvline(values.mean(), color=colour, linewidth=0.8, linestyle=":")
        axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xlabel("estimate (dotted: the mean)")
        axis.set_ylabel("density")
        axis.legend(fontsize=8, loc="upper right")
    return figure


def distances(runs: Mapping[tuple[int, int], Sequence[Distances]], note: str) -> Figure:
    """Distance of theta and of phi to the optimum: mean over repeats, and from the smallest to the largest."""
    figure, axes = panels(2, "Figure 7: distance to the optimum while training", note)
    for axis, part in zip(axes, ("theta", "phi"), strict=True):
        for ((groups, particles), repeats), colour in zip(
            runs.items(), (ORANGE, PINK, GREEN, BLUE, "black"), strict=False
        ):
            values = np.array([getattr(run, part) for run in repeats])
            steps = np.array(repeats[0].steps)
            axis.semilogy(steps, values.mean(0), color=colour, label=f"M = {groups:,}, K = {particles:,}")
            axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        axis.set_title(f"{'mu to mu*' if part == 'theta' else '(A, b) to (A*, b*)'}")
        axis.set_xlabel("step")
        axis.set_ylabel("Euclidean distance")
        axis.legend(fontsize=8, loc="upper right")
    return figure


def rmse(
    draws: Sequence[int], curves: Mapping[str, tuple[np.ndarray, str, str]], guide_from: tuple[float, float]
) -> Figure:
    """Root mean squared distance of theta's gradient to grad log Z."""
    figure, (axis,) = panels(1, "Gradient of theta: distance to grad log Z")
    for label, (values, colour, style) in curves.items():
        shown = np.isfinite(values) & (values > 0)
        axis.loglog(np.asarray(draws)[shown], values[shown], style, color=colour, label=label)
    x = np.asarray(draws, dtype=float)
    axis.loglog(x, guide_from[0] / x, "--", color="black", linewidth=1, label="slope -1")
    axis.loglog(x, guide_from[1] / np.sqrt(x), "--", color=GREY, linewidth=1, label="slope -1/2")
    _label(axis, "", "root mean squared error, norm over theta")
    return figure


def equation_9(draws: Sequence[int], cosines: Sequence[Estimate], lengths: Sequence[Estimate]) -> Figure:
    """Cosine of E grad_phi to -grad Var[w] / E[w]^2, and 2 K ||E grad_phi|| / ||grad Var[w] / E[w]^2||."""
    figure, axes = panels(2, "Equation 9: E grad_phi of IWAE is -grad Var[w / Z] / (2 K) for large K")
    for axis, values, title in zip(
        axes, (cosines, lengths), ("cosine", "ratio of lengths, 2 K ||E grad|| / ||grad Var||"), strict=True
    ):
        value, low, high = (np.array([getattr(each, part) for each in values]) for part in ("value", "low", "high"))
        axis.semilogx(draws, value, color=BLUE, marker="o", ms=4)
        axis.fill_between(np.asarray(draws, dtype=float), low, high, color=BLUE, alpha=0.25, linewidth=0)
        axis.axhline(1.0, color="black", linestyle="--", linewidth=1)
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.set_title(title)
        axis.set_xlabel("K")
    return figure


def batch_sizes(curves: Mapping[str, Mapping[str, snr.Curve]], note: str) -> Figure:
    """SNR against B for theta and phi."""
    figure, axes = panels(len(curves), "Signal-to-noise ratio against the size B of an i.i.d. minibatch", note)
    for axis, (title, by_name) in zip(axes, curves.items(), strict=True):
        for (label, curve), colour in zip(by_name.items(), (ORANGE, BLUE), strict=True):
            low, high = curve.interval()
            shown = curve.value > 0
            axis.loglog(curve.x[shown], curve.value[shown], color=colour, marker="o", ms=4, label=label)
            shown = shown & (low > 0)
            axis.vlines(curve.x[shown], low[shown], high[shown], color=colour, linewidth=1)
            axis.loglog(curve.x, snr.FLOORS * curve.floor, ":", color=colour, alpha=0.6)
        last = curve.value[-1]
        guide = last * np.sqrt(curve.x / curve.x[-1])
        axis.loglog(curve.x, guide, "--", color="black", linewidth=1, label="slope +0.5")
        axis.set_title(title)
        axis.set_xlabel("B (dotted: three noise floors)")
        axis.set_ylabel("signal-to-noise ratio")
        axis.legend(fontsize=8, loc="upper left")
    return figure


def names(moments: Moments) -> list[str]:
    """The estimators in the order of the legend."""
    there = {estimator.name for estimator in moments.estimators}
    return [name for name in STYLE if name in there]


def _style(name: str, moments: Moments) -> tuple[str, str, str]:
    """Label, colour and marker; for theta, PIWAE is IWAE on all draws."""
    label, colour, marker = STYLE[name]
    return (
        (f"{label} (and PIWAE)", colour, marker)
        if name == "iwae" and "piwae" not in names(moments)
        else (label, colour, marker)
    )


def _faint(lines: int) -> float:
    return 0.15 if lines > 100 else 0.5


def _label(axis: Axes, title: str, quantity: str) -> None:
    axis.set_title(title)
    axis.set_xlabel("number of draws (K for the bounds of K draws, M for averages)")
    axis.set_ylabel(quantity)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
