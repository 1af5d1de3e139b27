"""Convergence of variational autoencoders: gradient norms, bounds, depth, batch size and draws.

    python examples/vae_convergence.py --out runs/vae_convergence
    python examples/vae_convergence.py --out runs/quick --quick
    python examples/vae_convergence.py --out runs/vae_convergence --only optimisers --only "tighter bounds"
    python examples/vae_convergence.py --out runs/vae_convergence --all

Squared gradient norm and test bound of several seeds against steps and against seconds, with Adam and SGD under step
sizes C / sqrt(n) and, for contrast, Adam with constant steps; the ReLU twin; and for tighter bounds the IWAE over K,
growing K and the Renyi bound. First of the dense Deep Gaussian VAE on MNIST, bounded as the theorem asks, then of the
convolutional one with soft-clipped outputs, and of this also: beta-VAE; one more dense or convolutional layer; other
beta1; the grid of B and K. By default the rows of ``FIRST``, which two cores make in an hour; the others by ``--only``,
or by ``--all`` in some hours. Every row is kept as it is measured.
Source: Surendran et al. (2025), theorem for Adam and its experiments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cells import Cells, pick, preset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from vae_lab.training import Pair, interval, looks, networks_from, train

import bbvi_conv as bc
from bbvi_conv.data import celeba, cifar100, mnist
from bbvi_conv.model_file import load_module, load_programs, locate_model
from bbvi_conv.monitor.strata import Strata
from bbvi_conv.optim import Optimiser

BAR = 0.05
"""Largest upper end of the slope of the running mean over its envelope, for a run the theorem is about."""


@dataclass(frozen=True)
class Size:
    """How much work a run does; ``draws`` is the largest K, ``conv_draws`` that of the convolutional model."""

    steps: int
    seeds: int
    batch: int
    draws: int
    conv_draws: int
    train_images: int
    test_images: int
    test_draws: int
    channels: tuple[int, ...]
    latent: int = 32


SIZES = {
    "quick": Size(40, 2, 16, 4, 4, 400, 50, 5, (4, 8), 4),
    "default": Size(3_000, 5, 64, 20, 5, 12_000, 1_000, 10, (16, 32, 64)),
    "full": Size(100_000, 5, 64, 50, 50, 50_000, 10_000, 200, (32, 64, 128)),
}


@dataclass(frozen=True)
class Row:
    """One training: objective, optimiser, batch, options of the networks; ``group`` is the figure it belongs to.

    ``dense`` is a shipped model on MNIST, which takes the place of the convolutional one; ``longer`` multiplies the
    steps; ``strata`` are the stretches of steps looked at, those of ``train`` by default.
    """

    group: str
    objective: Any
    optimiser: Optimiser
    networks: dict[str, Any]
    batch: int
    dense: str | None = None
    longer: int = 1
    strata: Strata | None = None


CLOSE = Strata(min_length=1, growth=0.1)
"""Every step of a steep start, then every tenth of the way: what a slope needs in order to have a narrow interval."""
_adam = partial(bc.TheoremAdam, 0.01, 500.0)
ADAM = _adam()
DENSE_ADAM = bc.TheoremAdam(0.02, radius=200.0)
FIRST = (
    *("dense, adam", "dense, sgd", "dense, adam, constant 0.3", "dense, ReLU, unbounded", "dense, tighter bounds"),
    *("adam", "sgd", "beta 4", "ReLU, unclipped", "B 16, K 1"),
)
"""Rows, or groups of them, of a run at default size."""


def rows(size: Size) -> dict[str, Row]:
    """All rows by name."""
    elbo, every = bc.ELBO(1), max(1, size.steps // 6)

    def row(group: str, objective: Any = elbo, optimiser: Optimiser = ADAM, batch: int = size.batch, **net: Any) -> Row:
        return Row(group, objective, optimiser, net, batch, strata=CLOSE if group == "optimisers" else None)

    def dense(optimiser: Optimiser = DENSE_ADAM, name: str = "") -> Row:  # a constant step is late at its floor
        model = f"deep_gaussian_vae{name}"
        return Row("dense, optimisers", elbo, optimiser, {}, size.batch, model, longer=4, strata=CLOSE)

    found = {
        "dense, adam": dense(),
        "dense, sgd": dense(bc.SGD(bc.InverseSqrt(1e-3))),
        "dense, adam, constant 0.3": dense(bc.Adam(bc.Constant(0.3))),
        "dense, adam, constant 0.1": dense(bc.Adam(bc.Constant(0.1))),
        "dense, adam, constant 0.005": dense(bc.Adam(bc.Constant(0.005))),
        "dense, ReLU, unbounded": dense(name=":relu"),
        "adam": row("optimisers"),
        "sgd": row("optimisers", optimiser=bc.SGD(bc.InverseSqrt(1e-6))),
        "adam, constant 0.05": row("optimisers", optimiser=bc.Adam(bc.Constant(0.05))),
        "adam, constant 0.005": row("optimisers", optimiser=bc.Adam(bc.Constant(0.005))),
        "beta 4": row("beta-VAE", bc.ELBO(1, kl_weight=4.0)),
        "beta 0.25": row("beta-VAE", bc.ELBO(1, kl_weight=0.25)),
        "one more dense layer": row("depth", extra_dense=1),
        "one more convolution": row("depth", extra_conv=1),
        "ReLU, unclipped": row("smoothness", activation=nn.ReLU, clipped=False),
    }
    for beta1 in (0.0, 0.5, 0.99):
        found[f"beta1 {beta1:g}"] = row("beta1", optimiser=_adam(beta1=beta1, beta2=0.9999))
    for name, objective in tighter_bounds(size.draws, every).items():
        found[f"dense, {name}"] = Row(
            "dense, tighter bounds", objective, DENSE_ADAM, {}, size.batch, "deep_gaussian_vae"
        )
    for name, objective in tighter_bounds(size.conv_draws, every).items():
        found[name] = row("tighter bounds", objective)
    for batch in (size.batch // 4, size.batch):
        for draws in (1, max(2, size.draws // 4)):
            found[f"B {batch}, K {draws}"] = row("B and K", bc.IWAE(draws), batch=batch)
    return found


def tighter_bounds(most: int, every: int) -> dict[str, Any]:
    """IWAE over K up to ``most``, K that grows to it every so many steps, and the Renyi bound, by name."""
    fixed = {f"IWAE {draws}": bc.IWAE(draws) for draws in sorted({1, max(2, most // 4), most})}
    growing = bc.GrowingParticles(bc.IWAE(1), stop=most, every=every)
    return {**fixed, "growing K": growing, "Renyi IWAE": bc.VRIWAE(most, alpha=0.5)}


def networks(row: Row, size: Size, seed: int) -> Pair:
    """Model and guide of a row, with networks that start under a seed."""
    if row.dense is not None:
        path, name = locate_model(row.dense)
        model, guide = load_programs(str(path), name, seed=seed)
        assert guide is not None
        return model, guide
    options = {"channels": size.channels, "latent": size.latent, **row.networks}
    return networks_from(seed, lambda: load_module("conv_vae", seed=seed).vae(32, **options))  # type: ignore[no-any-return]


@cache
def images(size: Size, data: str, full: bool) -> tuple[Tensor, Tensor]:
    """Training and test images, in colour of 32 x 32."""
    if data == "mnist":
        parts = [mnist(split)[0] for split in ("train", "test")]
    elif data == "celeba":
        source: Any = "official" if full else "part"
        parts = [
            celeba(split, size=32, source=source, limit=count)[0]  # type: ignore[arg-type]
            for split, count in (("train", size.train_images), ("test", size.test_images))
        ]
    else:
        parts = [cifar100(split, source="official" if full else "part")[0] for split in ("train", "test")]  # type: ignore[arg-type]
    return parts[0][: size.train_images], parts[1][: size.test_images]


def measure(row: Row, size: Size, data: tuple[Tensor, Tensor], engine: str, device: str, seed: int) -> dict[str, Any]:
    """Train all seeds of a row side by side; test bounds at marks along the way."""

    def test_bound(fit: bc.Fit) -> dict[str, Any]:
        bounds = [
            float(bc.evaluate.elbo(one, (data[1],), num_particles=size.test_draws, seed=seed).values.mean())
            for one in fit.seeds
        ]
        return {"negative_elbo": [-bound for bound in bounds]}

    marks = sorted({max(1, round(row.longer * size.steps * share)) for share in (0.1, 0.25, 0.5, 0.75, 1.0)})
    fit, history = train(
        networks(row, size, seed),
        (data[0],),
        marks,
        test_bound,
        minibatch=bc.Minibatch(row.batch, plate="data"),
        objective=row.objective,
        optimiser=row.optimiser,
        num_seeds=size.seeds,
        seed=seed,
        engine=engine,
        device=device,
        **({} if row.strata is None else {"strata": row.strata}),
    )
    return {"group": row.group, "looks": looks(fit), "curve": history, "steps_seconds": fit.seconds["steps"]}


def at_seconds(row: dict[str, Any], seconds: float) -> Tensor:
    """Test negative ELBO of every seed after so many seconds of steps, by a straight line between marks."""
    curve = row["curve"]
    times = [point["seconds"] for point in curve]
    values = torch.tensor([point["negative_elbo"] for point in curve], dtype=torch.float64)
    after = next((i for i, t in enumerate(times) if t >= seconds), len(times) - 1)
    if after == 0 or times[after] <= seconds:
        return values[after]
    share = (seconds - times[after - 1]) / (times[after] - times[after - 1])
    return values[after - 1] + share * (values[after] - values[after - 1])


def tighter(own: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Test negative ELBO of the tighter bounds at equal steps and at equal seconds (those of the quickest row)."""
    seconds = min(row["curve"][-1]["seconds"] for row in own.values())
    ends = {n: torch.tensor(row["curve"][-1]["negative_elbo"], dtype=torch.float64) for n, row in own.items()}
    fixed = max((n for n in own if "IWAE " in n), key=lambda n: int(n.split()[-1]), default=None)
    result: dict[str, Any] = {
        "equal_steps": {n: interval(v) for n, v in ends.items()},
        "equal_seconds": {n: interval(at_seconds(row, seconds)) for n, row in own.items()},
        "seconds": seconds,
    }
    if fixed is not None:  # paired over seeds: they share rows and starts
        gains = {
            "equal_steps": {n: interval(ends[fixed] - v) for n, v in ends.items() if n != fixed},
            "equal_seconds": {
                n: interval(at_seconds(own[fixed], seconds) - at_seconds(row, seconds))
                for n, row in own.items()
                if n != fixed
            },
        }
        result["better_than"] = {"row": fixed, **gains}
    return result


def picture(group: str, found: dict[str, dict[str, Any]]) -> Figure:
    """Running mean of the squared gradient norm against the envelope, and the test bound, against steps and seconds."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    figure.suptitle(group)
    norm, steps, seconds = figure.subplots(1, 3)
    for name, row in found.items():
        x = torch.tensor(row["looks"]["step"], dtype=torch.float64) + 1
        values = torch.tensor(row["looks"]["gradient_norm_sq"], dtype=torch.float64).mean(0)
        widths = torch.diff(torch.cat([torch.zeros(1, dtype=torch.float64), x]))
        running = (values * widths).cumsum(0) / widths.cumsum(0)
        (line,) = norm.loglog(x, running.clamp(min=1e-12), label=name)
        _envelope(norm, x, running, line.get_color())
        means = [interval(torch.tensor(point["negative_elbo"])) for point in row["curve"]]
        for axis, key in ((steps, "step"), (seconds, "seconds")):
            at = [point[key] for point in row["curve"]]
            axis.plot(at, [m["value"] for m in means], "o-", color=line.get_color(), label=name)
            axis.fill_between(
                at, [m["low"] for m in means], [m["high"] for m in means], color=line.get_color(), alpha=0.15
            )
    norm.set_ylabel("running mean of the squared gradient norm")
    for axis, label in ((norm, "step n"), (steps, "step n"), (seconds, "seconds of steps, all seeds")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    steps.set_ylabel("test negative ELBO, nats an image")
    return figure


def _envelope(axis: Axes, x: Tensor, running: Tensor, colour: Any) -> None:
    """Dashed log n / sqrt n through the middle of the run."""
    shape = (x + 1).log() / x.sqrt()
    middle = len(x) // 2
    axis.loglog(x, shape * (running[middle] / shape[middle]).clamp(min=1e-12), "--", color=colour, linewidth=0.8)


def verdict(row: dict[str, Any]) -> dict[str, Any]:
    """The slope over the envelope, and whether its upper end is under the bar."""
    slope = row["looks"]["rate"]["envelope_slope"]
    high = slope.get("high")
    return {**slope, "at_most": BAR, "met": None if high is None else bool(high <= BAR), **row["looks"]["plateau"]}


def run(
    out: Annotated[Path, typer.Option(help="folder for the figures and results.json")],
    quick: Annotated[bool, typer.Option("--quick", help="small networks and few steps, for a test")] = False,
    full: Annotated[bool, typer.Option("--full", help="the paper's sizes, for a GPU")] = False,
    only: Annotated[list[str] | None, typer.Option(help="a row's name or group; may be given again")] = None,
    everything: Annotated[bool, typer.Option("--all", help="all rows at default size: some hours")] = False,
    data: Annotated[str, typer.Option(help="cifar100 or celeba")] = "cifar100",
    engine: Annotated[str, typer.Option(help="of the steps")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    steps: Annotated[
        int | None, typer.Option(help="of a row, a longer one its multiple; by default the size's", min=1)
    ] = None,
    draws: Annotated[
        int | None, typer.Option(help="the largest K of the convolutional model; by default the size's", min=2)
    ] = None,
    seed: Annotated[int, typer.Option(help="the first one, of starts, rows and noise", min=0)] = 0,
) -> None:
    """Train the rows, draw them and write results.json."""
    if data not in ("cifar100", "celeba"):
        raise typer.BadParameter(f"data must be cifar100 or celeba, got {data!r}")
    chosen_size = preset(quick, full)
    size = SIZES[chosen_size]
    size = replace(size, steps=steps or size.steps, conv_draws=draws or size.conv_draws)
    known = rows(size)
    first = FIRST if chosen_size == "default" and not everything else None
    chosen = pick(only or first, {name: row.group for name, row in known.items()})
    of_rows = ("batch", "draws", "conv_draws")  # a row says its own
    sizes = {name: value for name, value in asdict(size).items() if name not in of_rows}
    settings = {"preset": chosen_size, "data": data, "seed": seed, **sizes, "channels": list(size.channels)}
    cells = Cells(out, settings)
    found: dict[str, dict[str, Any]] = {}
    for name in chosen:

        def measured(row: Row = known[name]) -> dict[str, Any]:
            shown = images(size, "mnist" if row.dense else data, full)
            return measure(row, size, shown, engine, device, seed)

        found[name] = cells.get(name.replace(" ", "_").replace(",", ""), measured, row=repr(known[name]))
    groups = {
        group: {name: row for name, row in found.items() if row["group"] == group}
        for group in dict.fromkeys(row["group"] for row in found.values())
    }
    for group, own in groups.items():
        if group in ("beta-VAE", "depth", "smoothness", "beta1") and "adam" in found:
            own = {"adam": found["adam"], **own}
        picture(group, own).savefig(out / f"{group.replace(' ', '_').replace(',', '')}.png", dpi=120)
    slopes = {name: verdict(row) for name, row in found.items()}
    bounds = {group: tighter(own) for group, own in groups.items() if "tighter bounds" in group}
    cells.conclude({"slopes": slopes, "tighter_bounds": bounds, "rows": found})
    for name, slope in slopes.items():
        if slope["value"] is None:
            typer.echo(f"{name}: slope not available: {slope['reason']}")
        else:
            typer.echo(
                f"{name}: slope {slope['value']:+.3f} [{slope['low']:+.3f}, {slope['high']:+.3f}], {slope['trend']}"
            )


if __name__ == "__main__":
    typer.run(run)
