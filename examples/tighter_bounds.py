"""Figures 1-11 and equation 9 of Rainforth et al. (2018), "Tighter variational bounds are not necessarily better".

    python examples/tighter_bounds.py all --out runs/tighter_bounds
    python examples/tighter_bounds.py fig2 --quick --out runs/quick

One set of draws serves all K (the first K draws), all M and all estimators; points and curves are therefore
correlated, and the intervals, from a jackknife over batches of estimates, count that in. Everything lands in the folder
given by --out: a PNG for each figure and results.json. https://arxiv.org/abs/1802.04537
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from cells import write
from matplotlib.figure import Figure
from rainforth2018 import figures, gradients, snr
from rainforth2018.laboratory import Moments, Plan, Setting, Single, measure, measure_batch_size
from rainforth2018.training import Training, train
from torch import Tensor

from bbvi_conv.model_file import load_module
from bbvi_conv.monitor.intervals import Estimate
from bbvi_conv.program.noise import generator

ENDS = (1, 2, 4, 8, 16, 32, 64, 104, 184, 320, 568, 1000)
"""Numbers of draws: about evenly spaced logarithms, and multiples of 8 wherever PIWAE is defined."""
LATE = (100.0, 1000.0)
BARS = {
    "theta_M": (0.5, 0.03),
    "phi_M": (0.5, 0.03),
    "theta_B": (0.5, 0.03),
    "phi_B": (0.5, 0.03),
    "phi_K_iwae": (-0.5, 0.05),
    "phi_K_dreg": (0.5, 0.1),
    "phi_K_vr05": (0.5, 0.1),
    "theta_K": (0.5, 0.07),
}
"""Slope that theory gives, and how far from it the measured one may lie."""


gaussian = load_module("tighter_bounds")


@dataclass(frozen=True)
class Size:
    """How much work a run does."""

    estimates: int
    batches: int
    data: int
    ends: tuple[int, ...]
    training: Training
    judged: bool = True
    """Whether there is enough of everything to hold slopes against their bars."""
    minibatch_factor: int = 4
    """Estimates against B are so many times more, since they cost so much less."""


SIZES = {
    "quick": Size(160, 16, 128, ENDS[:10], Training(steps=200), judged=False),
    "default": Size(1_000, 40, 1_024, ENDS, Training(steps=5_000)),
    "paper": Size(10_000, 40, 1_024, ENDS, Training(steps=20_000)),
}
SETTINGS = {"main": (0.01, 2 / 3), "covariance": (0.01, 1.0), "offset": (0.5, 2 / 3)}
"""Offset of the parameters from the optimum, and the guide's variance."""


class Study:
    """Data, settings and what has been measured of them, each when it is first asked for."""

    def __init__(self, size: Size, seed: int, workers: int, wanted: set[str]) -> None:
        self.size, self.seed, self.workers = size, seed, workers
        self.wanted = [name for name in SETTINGS if name in wanted]
        self.results: dict[str, Any] = {}
        (self.x,) = gaussian.data(size=size.data, seed=seed)

    def parameters(self, name: str) -> Any:
        return gaussian.near_optimum(self.x, offset=SETTINGS[name][0], seed=self.seed + 1)

    def setting(self, name: str) -> Setting:
        mu, slope, offset = self.parameters(name)
        mean = self.x @ slope.T + offset
        return Setting(self.x, mean - (self.x + mu) / 2, mean - mu, SETTINGS[name][1])

    @functools.cached_property
    def plan(self) -> Plan:
        return Plan(self.size.estimates, self.size.batches, self.size.ends, self.seed, self.workers)

    @functools.cached_property
    def moments(self) -> dict[str, tuple[Moments, Moments]]:
        """For phi and for theta, at every wanted setting."""
        done, began = 0, time.perf_counter()

        def progress() -> None:
            nonlocal done
            done += 1
            if done % (self.plan.batches // 8) == 0:
                spent = time.perf_counter() - began
                typer.echo(f"  estimates: batch {done} of {self.plan.batches}, {spent:.0f} s", err=True)

        found = measure([self.setting(name) for name in self.wanted], self.plan, progress)
        return dict(zip(self.wanted, found, strict=True))

    def curve(self, setting: str, part: int, name: str) -> snr.Curve:
        single = self.moments[setting][part].of(name)
        return snr.curve(single.draws, single.total, single.norms, single.per_batch)

    def slope(self, key: str, found: snr.Slope) -> None:
        """Put a slope among the results, with its bar where there is one."""
        entry = found.to_json()
        if key in BARS and self.size.judged:
            target, width = BARS[key]
            value = found.estimate.value
            entry |= {
                "bar": [target - width, target + width],
                "met": value is not None and abs(value - target) <= width,
            }
        self.results.setdefault("slopes", {})[key] = entry


def figure_1(study: Study) -> Figure:
    """Histograms of the gradient for A and for mu with one datum in one dimension."""
    (x,) = gaussian.data(size=1, dim=1, seed=study.seed)
    mu, slope, offset = gaussian.near_optimum(x, offset=0.01, seed=study.seed + 1)
    scale = math.sqrt(gaussian.VARIANCE)
    mean = x @ slope.T + offset
    gap, ahead = mean - (x + mu) / 2, mean - mu
    count, ends = 10 * study.size.estimates, (1, 10, 100, 1000)
    source = generator(study.seed, "figure 1", 0)
    phi_all = [e for e in gradients.phi_estimators(scale) if e.name == "iwae"]
    theta_all = [e for e in gradients.theta_estimators(scale) if e.name == "iwae"]
    pieces: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, count, 500):
        size = min(500, count - start)
        noise = torch.randn(size, ends[-1], 1, generator=source, dtype=torch.float64)
        here, there = gap.expand(size, 1), ahead.expand(size, 1)
        log_w = gradients.log_weights(noise, noise.square().sum(-1), here, scale)
        rows = gradients.vectors(noise, log_w, here, ends)
        pieces[0].append(gradients.combine(phi_all, rows, here[:, None])[0, ..., 0] * x[0, 0])
        pieces[1].append(gradients.combine(theta_all, rows, there[:, None])[0, ..., 0])
    phi, theta = (torch.cat(each).numpy() for each in pieces)
    study.results["figure1"] = {
        name: [
            {"K": k, "mean": float(values[:, i].mean()), "std": float(values[:, i].std(ddof=1)), "estimates": count}
            for i, k in enumerate(ends)
        ]
        for name, values in (("A", phi), ("mu", theta))
    }
    samples = {
        "inference network: A": {k: phi[:, i] for i, k in enumerate(ends)},
        "generative network: mu": {k: theta[:, i] for i, k in enumerate(ends)},
    }
    return figures.histograms(samples, f"{count:,} estimates; each K uses the first K of the same draws.")


def figure_2(study: Study) -> Figure:
    """SNR of phi against K and M, and the slopes for phi."""
    study.slope("phi_M", snr.slope(study.curve("main", 0, "vae"), (1.0, 1000.0)))
    study.slope("phi_K_iwae", snr.slope(study.curve("main", 0, "iwae"), (1.0, 1000.0)))
    for key in ("dreg", "vr05", "vr02", "vr05_dreg", "vr02_dreg"):
        study.slope(f"phi_K_{key}", snr.slope(study.curve("main", 0, key), LATE))
    study.slope("phi_MK_piwae", snr.slope(study.curve("main", 0, "piwae"), (1.0, 1000.0)))
    record_curves(study, "main", 0)
    return _snr_figure(study, "main", (0,), "Figure 2: signal-to-noise ratio, inference network (phi)")


def figure_3(study: Study) -> Figure:
    """SNR of theta against K and M, and the slopes for theta."""
    study.slope("theta_M", snr.slope(study.curve("main", 1, "vae"), (1.0, 1000.0)))
    for key, name in (("theta_K", "iwae"), ("theta_K_vr05", "vr05"), ("theta_K_vr02", "vr02")):
        study.slope(key, snr.slope(study.curve("main", 1, name), LATE))
    record_curves(study, "main", 1)
    return _snr_figure(study, "main", (1,), "Figure 3: signal-to-noise ratio, generative network (theta)")


def figure_4(study: Study) -> Figure:
    """DSNR of phi."""
    record_ratios(study, "main", 0)
    return _dsnr_figure(study, "main", (0,), "Figure 4: directional signal-to-noise ratio, inference network (phi)")


def figure_5(study: Study) -> Figure:
    """DSNR of theta."""
    record_ratios(study, "main", 1)
    return _dsnr_figure(study, "main", (1,), "Figure 5: directional signal-to-noise ratio, generative network (theta)")


def figure_6(study: Study) -> Figure:
    """DSNR of both towards the mean direction at the largest K."""
    title = f"Figure 6: directional signal-to-noise ratio towards E of the gradient at K = {study.plan.ends[-1]:,}"
    for part in (0, 1):
        record_ratios(study, "main", part, aimed=True)
    return _dsnr_figure(study, "main", (0, 1), title, aimed=True)


def figure_7(study: Study) -> Figure:
    """Training from U[1.5, 2.5] with equal budgets M K, three repeats."""
    training, budget = study.size.training, study.plan.ends[-1]
    pairs = [(budget, 1), (budget // 10, 10), (10, budget // 10), (1, budget)]
    jobs = [(pair, study.seed + repeat) for repeat in range(3) for pair in pairs]
    with ThreadPoolExecutor(study.workers) as pool:
        found = list(pool.map(lambda job: train(study.x, gaussian.VARIANCE, *job[0], training, job[1]), jobs))
    runs = {pair: [run for (p, _), run in zip(jobs, found, strict=True) if p == pair] for pair in pairs}
    averaged = max(1, len(found[0].steps) // 5)
    last = {
        pair: {part: [float(np.mean(getattr(run, part)[-averaged:])) for run in repeats] for part in ("phi", "theta")}
        for pair, repeats in runs.items()
    }
    vae, iwae = last[(budget, 1)], last[(1, budget)]
    study.results["figure7"] = {
        "final_distance": [
            {"M": m, "K": k, "phi": last[(m, k)]["phi"], "theta": last[(m, k)]["theta"]} for m, k in pairs
        ],
        "final_distance_is": f"the mean over the last fifth of {training.steps} steps, each repeat apart",
        "phi_ordering": "K = 1 nearer than K = budget in every repeat"
        if all(a < b for a, b in zip(vae["phi"], iwae["phi"], strict=True))
        else "K = 1 not nearer than K = budget in every repeat",
        "phi_K1_nearer": [a < b for a, b in zip(vae["phi"], iwae["phi"], strict=True)],
        "training": vars(training),
    }
    note = (
        f"Adam, step {training.step_size}, minibatches of {training.batch} i.i.d. rows, start uniform on "
        f"[{training.low}, {training.high}]; mean and range of three repeats."
    )
    return figures.distances(runs, note)


def figure_8(study: Study) -> Figure:
    """Appendix C: SNR where the guide's covariance is the identity."""
    return _appendix_snr(study, "covariance", "Figure 8: signal-to-noise ratio, guide with covariance I")


def figure_9(study: Study) -> Figure:
    """Appendix C: DSNR where the guide's covariance is the identity."""
    return _appendix_dsnr(study, "covariance", "Figure 9: directional signal-to-noise ratio, guide with covariance I")


def figure_10(study: Study) -> Figure:
    """Appendix C: SNR far from the optimum."""
    return _appendix_snr(study, "offset", "Figure 10: signal-to-noise ratio, parameters offset by 0.5")


def figure_11(study: Study) -> Figure:
    """Appendix C: DSNR far from the optimum."""
    return _appendix_dsnr(study, "offset", "Figure 11: directional signal-to-noise ratio, parameters offset by 0.5")


def rmse(study: Study) -> Figure:
    """Distance of theta's gradient to grad log Z, whose exact value is (mean x - mu) / 2."""
    exact = (study.x.mean(0) - study.parameters("main").mu) / 2
    iwae, vae = (study.moments["main"][1].of(name) for name in ("iwae", "vae"))
    x = np.asarray(iwae.draws, dtype=float)

    def root(single: Single, averaged: float) -> tuple[np.ndarray, np.ndarray]:
        """Value and leave-one-out values of sqrt(bias^2 + variance / M): averaging M estimates leaves the bias."""

        def statistic(total: Tensor, norms: Tensor, count: int) -> np.ndarray:
            bias = snr.squared_bias(total, norms, count, exact)
            spread = snr.squared_distance(total, norms, count, exact) - bias
            return np.sqrt(np.maximum(bias + spread / averaged, 0.0))

        value, _, left_out = snr.jackknife(statistic, single.total, single.norms, single.per_batch)
        return value, left_out

    shown = {
        "IWAE, M = 1": (iwae, 1.0, figures.BLUE, "o-"),
        "IWAE, M = 100": (iwae, 100.0, figures.SKY, "o-"),
        "IWAE, bias alone": (iwae, math.inf, figures.GREEN, "^-"),
        "VAE, M draws": (vae, 1.0, figures.ORANGE, "s-"),
    }
    values = {label: root(single, averaged) for label, (single, averaged, _, _) in shown.items()}
    windows = {
        "bias": ("IWAE, bias alone", (8.0, 104.0)),
        "early": ("IWAE, M = 100", (4.0, 32.0)),
        "late": ("IWAE, M = 1", LATE),
    }
    slopes = {}
    for key, (label, window) in windows.items():
        value, left_out = values[label]
        keep = (x >= window[0]) & (x <= window[1]) & (value > 0)
        slopes[key] = {**snr.fit_slope(x, value, left_out, keep, window).to_json(), "curve": label}
    study.results["rmse"] = {
        "draws": list(iwae.draws),
        "curves": {label: value.tolist() for label, (value, _) in values.items()},
        "slopes": slopes,
        "reference": "grad log Z = (mean of x - mu) / 2, exact",
    }
    curves = {label: (values[label][0], colour, style) for label, (_, _, colour, style) in shown.items()}
    bias, one = values["IWAE, bias alone"][0], values["IWAE, M = 1"][0]
    middle = len(x) // 2
    return figures.rmse(iwae.draws, curves, (bias[middle] * x[middle], one[-1] * math.sqrt(x[-1])))


def equation_9(study: Study) -> Figure:
    """E grad_phi of IWAE against its leading term, -grad Var[w] / (2 K Z^2), exact by differentiation."""
    mu, slope, offset = (p.requires_grad_() for p in study.parameters("main"))
    spread = gaussian.relative_weight_variance(study.x, gaussian.Parameters(mu, slope, offset), SETTINGS["main"][1])
    by_slope, by_offset = torch.autograd.grad(spread.mean(), [slope, offset])
    target = -torch.cat([by_offset[:, None], by_slope], 1).flatten()
    quiet = study.moments["main"][0].of("dreg")
    x = torch.tensor(quiet.draws, dtype=torch.float64)

    def cosines(total: Tensor, norms: Tensor, count: int) -> np.ndarray:
        return snr.cosine(total, norms, count, target)

    def lengths(total: Tensor, norms: Tensor, count: int) -> np.ndarray:
        return snr.length(total, norms, count) * (2 * x / target.norm()).numpy()

    found = []
    for statistic in (cosines, lengths):
        value, half, _ = snr.jackknife(statistic, quiet.total, quiet.norms, quiet.per_batch)
        found.append([Estimate(float(v), float(v - h), float(v + h)) for v, h in zip(value, half, strict=True)])
    study.results["eq9"] = {
        "K": list(quiet.draws),
        "cosine": [each.to_json() for each in found[0]],
        "length_ratio": [each.to_json() for each in found[1]],
        "mean_taken_from": "the doubly reparameterised estimator, which has the same expectation",
    }
    return figures.equation_9(quiet.draws, *found)


def minibatches(study: Study) -> Figure:
    """SNR against B: rows drawn i.i.d., K = 1 and K = 8, on draws of their own."""
    sizes = [2**power for power in range(int(math.log2(study.size.data)) + 1)]
    plan = Plan(
        study.size.minibatch_factor * study.plan.estimates, study.plan.batches, (1, 8), study.seed, study.workers
    )
    curves: dict[str, dict[str, snr.Curve]] = {"phi": {}, "theta": {}}
    parts = measure_batch_size(study.setting("main"), plan, sizes)
    for name, (total, norms) in zip(curves, parts, strict=True):
        for place, (particles, suffix) in enumerate(zip(plan.ends, ("", "_K8"), strict=True)):
            curve = snr.curve(sizes, total[:, place], norms[:, place], plan.estimates // plan.batches)
            curves[name][f"IWAE, K = {particles}"] = curve
            study.slope(f"{name}_B{suffix}", snr.slope(curve, (1.0, float(sizes[-1]))))
    note = f"{plan.estimates:,} minibatches; B uses the first B rows of the same draw, so points are correlated."
    return figures.batch_sizes(
        {"inference network (phi)": curves["phi"], "generative network (theta)": curves["theta"]}, note
    )


def _snr_figure(study: Study, setting: str, parts: tuple[int, ...], title: str) -> Figure:
    figure, axes = figures.panels(len(parts), title)
    for axis, part in zip(axes, parts, strict=True):
        figures.snr_panel(axis, study.moments[setting][part], PARTS[part] if len(parts) > 1 else "")
    return figure


def _dsnr_figure(study: Study, setting: str, parts: tuple[int, ...], title: str, *, aimed: bool = False) -> Figure:
    figure, axes = figures.panels(len(parts), title)
    for axis, part in zip(axes, parts, strict=True):
        figures.dsnr_panel(axis, study.moments[setting][part], PARTS[part] if len(parts) > 1 else "", aimed=aimed)
    return figure


def _appendix_snr(study: Study, setting: str, title: str) -> Figure:
    for part in (0, 1):
        record_curves(study, setting, part)
    return _snr_figure(study, setting, (0, 1), title)


def _appendix_dsnr(study: Study, setting: str, title: str) -> Figure:
    for part in (0, 1):
        record_ratios(study, setting, part)
    return _dsnr_figure(study, setting, (0, 1), title)


PARTS = ("inference network (phi)", "generative network (theta)")
KEYS = ("phi", "theta")


def record_curves(study: Study, setting: str, part: int) -> None:
    """Aggregate SNR, interval and noise floor of every estimator into the results."""
    found = {}
    for name in figures.names(study.moments[setting][part]):
        curve = study.curve(setting, part, name)
        low, high = curve.interval()
        columns = {"draws": curve.x, "value": curve.value, "low": low, "high": high, "floor": curve.floor}
        found[name] = {key: column.tolist() for key, column in columns.items()}
    study.results.setdefault("snr", {}).setdefault(setting, {})[KEYS[part]] = found


def record_ratios(study: Study, setting: str, part: int, *, aimed: bool = False) -> None:
    """Mean and quartiles of directional ratios of every estimator into the results."""
    moments = study.moments[setting][part]
    found: dict[str, Any] = {"random_vector": snr.random_ratio(moments.total.shape[-1])}
    for name in figures.names(moments):
        single = moments.of(name)
        ratios = (single.aimed if aimed else single.ratios).numpy()
        quartiles = np.quantile(ratios, [0.25, 0.75], axis=0).tolist()
        found[name] = {"draws": list(single.draws), "mean": ratios.mean(0).tolist(), "quartiles": quartiles}
    key = "dsnr_to_largest_K" if aimed else "dsnr"
    study.results.setdefault(key, {}).setdefault(setting, {})[KEYS[part]] = found


FIGURES: dict[str, tuple[Callable[[Study], Figure], str | None]] = {
    "fig1": (figure_1, None),
    "fig2": (figure_2, "main"),
    "fig3": (figure_3, "main"),
    "fig4": (figure_4, "main"),
    "fig5": (figure_5, "main"),
    "fig6": (figure_6, "main"),
    "fig7": (figure_7, None),
    "fig8": (figure_8, "covariance"),
    "fig9": (figure_9, "covariance"),
    "fig10": (figure_10, "offset"),
    "fig11": (figure_11, "offset"),
    "rmse": (rmse, "main"),
    "eq9": (equation_9, "main"),
    "batch": (minibatches, None),
}
"""Every figure, and the setting whose estimates it is made of."""

Choice = StrEnum("Choice", ["all", *FIGURES])  # type: ignore[misc]


def run(
    figure: Annotated[Choice, typer.Argument(help="all, or one figure")],
    out: Annotated[Path, typer.Option(help="folder for the PNGs and results.json")],
    paper: Annotated[bool, typer.Option("--paper", help="10,000 estimates, as in the paper")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="under a minute: fewer estimates, data and draws")] = False,
    seed: Annotated[int, typer.Option(help="of data, offsets and draws", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="threads; results do not depend on it", min=1)] = os.cpu_count() or 1,
) -> None:
    """Reproduce the figures of Rainforth et al. (2018) and write results.json."""
    if paper and quick:
        raise typer.BadParameter("choose either --paper or --quick")
    torch.set_num_threads(1)  # each worker is a thread that runs small operations: more threads inside them only wait
    preset = "paper" if paper else "quick" if quick else "default"
    size, began = SIZES[preset], time.perf_counter()
    chosen = list(FIGURES) if figure == "all" else [str(figure)]
    study = Study(size, seed, workers, {need for name in chosen if (need := FIGURES[name][1]) is not None})
    out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        start = time.perf_counter()
        figures.save(FIGURES[name][0](study), str(out / f"{name}.png"))
        typer.echo(f"{name}: {out / f'{name}.png'}, {time.perf_counter() - start:.1f} s")
    settings = {
        "preset": preset,
        "estimates": size.estimates,
        "batches": size.batches,
        "data": size.data,
        "dimension": study.x.shape[1],
        "draws": list(size.ends),
        "seed": seed,
        "workers": workers,
        "settings": {name: {"offset": o, "variance": v} for name, (o, v) in SETTINGS.items()},
    }
    study.results |= {"run": settings, "note": figures.CORRELATED, "seconds": time.perf_counter() - began}
    write(out / "results.json", study.results)
    for key, entry in study.results.get("slopes", {}).items():
        typer.echo(f"{key:>16}: {_sentence(entry)}")
    typer.echo(f"results: {out / 'results.json'}, {study.results['seconds']:.0f} s in all")


def _sentence(entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return str(entry["reason"])
    low, high = entry["window"]
    found = f"{entry['value']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]"
    found += f" over {low:g} to {high:g}, {len(entry['points'])} points"
    if "bar" in entry:
        found += f", bar [{entry['bar'][0]:.2f}, {entry['bar'][1]:.2f}]: {'met' if entry['met'] else 'missed'}"
    return found


if __name__ == "__main__":
    typer.run(run)
