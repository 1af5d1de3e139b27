"""The MNIST table of importance weighted autoencoders: test likelihoods for k = 1, 5, 50, one stochastic layer.

    python examples/iwae_table.py --out runs/iwae_table
    python examples/iwae_table.py --out runs/quick --quick
    python examples/iwae_table.py --out runs/iwae_table --only k1 --only k5

Pixels are binarised anew at every visit; test likelihoods are by importance sampling with 5,000 draws an image, on one
binarisation of the test images. Doubly reparameterised gradients (DReG) stand beside the pathwise ones. Every row is
kept as it is measured.
Source: Burda et al. (2016), table 1, https://arxiv.org/abs/1509.00519; Tucker et al. (2019),
https://arxiv.org/abs/1810.04152
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cells import Cells, bar, pick, preset
from matplotlib.figure import Figure
from vae_lab.training import interval, train

import bbvi_conv as bc
from bbvi_conv.model_file import load_module

DREG = "doubly-reparameterised"
ROWS: dict[str, tuple[int, Any]] = {
    "k1": (1, bc.ELBO(1)),
    "k5": (5, bc.IWAE(5)),
    "k50": (50, bc.IWAE(50)),
    "k5 DReG": (5, bc.IWAE(5, DREG)),
    "k50 DReG": (50, bc.IWAE(50, DREG)),
}
PAPER = {"k1": 86.76, "k5": 85.54, "k50": 84.78}
STEP_SIZE = 2e-3
"""Of Adam at the start; a cosine takes it to a hundredth."""

BARS = {"default": {"k1": 87.8, "k5": 86.4}, "full": {"k1": 86.9, "k5": 85.7, "k50": 84.9}}


@dataclass(frozen=True)
class Size:
    """How much work a run does: steps for k = 1, 5 and 50, draws of the test likelihood, test images."""

    steps: tuple[int, int, int]
    draws: int
    images: int
    batch: int = 100


SIZES = {
    "quick": Size((60, 40, 20), 100, 200),
    "default": Size((800_000, 400_000, 30_000), 5_000, 10_000),
    "full": Size((1_968_000, 1_968_000, 1_968_000), 5_000, 10_000),  # 3,280 passes over 60,000 images
}


def measure(name: str, size: Size, engine: str, device: str, seed: int) -> dict[str, Any]:
    """Train one row and estimate the test likelihood on the way and at the end."""
    draws, objective = ROWS[name]
    module = load_module("bernoulli_vae", seed=seed)
    steps = size.steps[(1, 5, 50).index(draws)]
    seen, *others = module.held_out()
    few = (seen[: min(1000, size.images)], *others)

    def on_the_way(fit: bc.Fit) -> dict[str, Any]:
        found = bc.evaluate.log_likelihood(fit, few, num_particles=min(size.draws, 200), seed=seed)
        return {"nll": -float(found.values.mean()), "draws": found.num_weights, "images": len(few[0])}

    marks = sorted({max(1, round(steps * share)) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)})
    fit, history = train(
        (module.model, module.guide),
        module.data(),
        marks,
        on_the_way,
        minibatch=bc.Minibatch(size.batch, plate="data"),
        objective=objective,
        optimiser=bc.Adam(bc.CosineDecay(STEP_SIZE, steps, final=0.01), eps=1e-4),
        engine=engine,
        device=device,
        seed=seed,
        num_gradients=4,
    )
    found = bc.evaluate.log_likelihood(fit, (seen[: size.images], *others), num_particles=size.draws, seed=seed)
    used = bc.evaluate.latents(fit, (seen[: min(2000, size.images)], *others), seed=seed)
    return {
        "k": draws,
        "estimator": objective.estimator,
        "steps": steps,
        "nll": -float(found.values.mean()),
        "monte_carlo": found.mean.to_json(),
        "smallest_ess": float(found.ess.min()),
        "values": [round(float(v), 4) for v in found.values],
        "active_units": used.active["z"],
        "curve": history,
    }


def difference(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float]:
    """Mean of NLL(first) - NLL(second) over the same images, with its paired 95 % interval."""
    gap = torch.tensor(second["values"], dtype=torch.float64) - torch.tensor(first["values"], dtype=torch.float64)
    return interval(gap)


def picture(rows: dict[str, dict[str, Any]]) -> Figure:
    """Test NLL on the way against steps and against hours."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, unit in zip(figure.subplots(1, 2, sharey=True), ("step", "hours"), strict=True):
        for name, row in rows.items():
            x = [point["step"] if unit == "step" else point["seconds"] / 3600 for point in row["curve"]]
            axis.semilogx(x, [point["nll"] for point in row["curve"]], "o-", label=name)
        axis.set_xlabel(unit)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.axes[0].set_ylabel("test NLL on the way, nats an image")
    return figure


def run(
    out: Annotated[Path, typer.Option(help="folder for the figure and results.json")],
    quick: Annotated[bool, typer.Option("--quick", help="a few steps of every row, for a test")] = False,
    full: Annotated[bool, typer.Option("--full", help="as many passes as in the paper, for a GPU")] = False,
    only: Annotated[list[str] | None, typer.Option(help="a row, or all of a k, as 'k = 5'; may be given again")] = None,
    engine: Annotated[str, typer.Option(help="of the steps")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    seed: Annotated[int, typer.Option(help="of starts, rows and noise", min=0)] = 0,
) -> None:
    """Train the rows, estimate their test likelihoods, and write results.json."""
    chosen_size = preset(quick, full)
    size = SIZES[chosen_size]
    settings = {"preset": chosen_size, "seed": seed, "step_size": STEP_SIZE}
    cells = Cells(out, settings | asdict(size) | {"steps": list(size.steps)})
    rows = {
        name: cells.get(name.replace(" ", "_"), lambda n=name: measure(n, size, engine, device, seed))  # type: ignore[misc]
        for name in pick(only, {name: f"k = {draws}" for name, (draws, _) in ROWS.items()})
    }
    picture(rows).savefig(out / "nll.png", dpi=130)
    bars = {name: bar(rows[name]["nll"], limit) for name, limit in BARS.get(chosen_size, {}).items() if name in rows}
    orders = (("k1", "k5"), ("k5", "k50"), ("k50", "k50 DReG"), ("k5", "k5 DReG"))
    gains = {f"{a} - {b}": difference(rows[a], rows[b]) for a, b in orders if a in rows and b in rows}
    shown = {name: {key: value for key, value in row.items() if key != "values"} for name, row in rows.items()}
    cells.conclude({"rows": shown, "paper": PAPER, "bars": bars, "differences": gains})
    for name, row in rows.items():
        typer.echo(f"{name:>9}: NLL {row['nll']:.2f}, {row['active_units']} active units, paper {PAPER.get(name, '-')}")


if __name__ == "__main__":
    typer.run(run)
