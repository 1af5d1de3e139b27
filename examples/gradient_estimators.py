"""A VAE from first principles: reparameterised against score-function gradients, closed-form KL against Monte Carlo.

    python examples/gradient_estimators.py --out runs/gradient_estimators
    python examples/gradient_estimators.py --out runs/quick --quick

For the VAE of Kingma and Welling on MNIST, four estimators of one and the same gradient: pathwise, sticking the
landing, pathwise with the KL in closed form, and the score function with a leave-one-out baseline. At points along one
run, the trace of the covariance of each and the bias of each against the pathwise one; then a run by each.
Sources: Kingma and Welling (2014), https://arxiv.org/abs/1312.6114; Roeder et al. (2017),
https://arxiv.org/abs/1703.09194; Ranganath et al. (2014), https://arxiv.org/abs/1401.0118
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pyro
import pyro.distributions as dist
import torch
import typer
from cells import Cells
from matplotlib.figure import Figure
from torch import Tensor
from vae_lab.training import looks, train

import bbvi_conv as bc
from bbvi_conv.engine import Calculus, Stream
from bbvi_conv.families.mean_field import ScoredNormal
from bbvi_conv.model_file import load_module
from bbvi_conv.program.closed_form import closed_form_sites
from bbvi_conv.program.trace import TracedLogWeights


@dataclass(frozen=True)
class Size:
    """How much work a run does: images, steps, gradients at a point, draws of each gradient."""

    images: int
    steps: int
    gradients: int
    draws: int = 2
    batch: int = 64


SIZES = {"quick": Size(500, 30, 16), "default": Size(60_000, 3_000, 256)}
OBJECTIVES: dict[str, Callable[[int], bc.ELBO]] = {
    "pathwise": lambda m: bc.ELBO(m),
    "sticking the landing": lambda m: bc.ELBO(m, estimator="sticking-the-landing"),
    "closed-form KL": lambda m: bc.ELBO(m, analytic_kl=True),
    "score function": lambda m: bc.ELBO(m),
}


def pair(name: str, seed: int) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """Model and guide of ``models/vae.py``; for the score function with draws that carry no gradient."""
    module = load_module("vae", seed=seed)
    if name != "score function":
        return module.model, module.guide

    def guide(images: Tensor) -> None:
        pyro.module("encoder", module.encoder)
        with pyro.plate("data", len(images)):
            loc, log_scale = module.encoder(module.pixels(images)).chunk(2, dim=-1)
            pyro.sample("z", dist.Independent(ScoredNormal(loc, log_scale.exp()), 1))

    return module.model, guide


def variances(name: str, points: dict[int, Tensor], images: Tensor, size: Size, seed: int) -> dict[str, Any]:
    """Trace of the covariance and mean of one gradient for phi at every point, on rows and noise common to all."""
    program = bc.build(*pair(name, seed), (images,), minibatch=bc.Minibatch(size.batch, plate="data"))
    objective = OBJECTIVES[name](size.draws)
    if objective.analytic_kl:
        program.analytic = closed_form_sites(program)
    calculus = Calculus(program, objective, TracedLogWeights(program), float(len(images)))
    part = program.groups["phi"]
    found: dict[str, Any] = {"step": [], "trace": [], "norm_sq": [], "mean": []}
    for step, x in points.items():
        total = torch.zeros(part.stop - part.start, dtype=torch.float64)
        square, count = 0.0, 0
        for key in range(0, size.gradients, 16):
            feed = Stream(program, seed, f"compare {step}", size.draws).once(key, 16)
            gradients = calculus.gradients(x, feed)[0][:, part].double()
            total += gradients.sum(0)
            square += float(gradients.square().sum())
            count += 16
        mean = total / count
        trace = (square - count * float(mean.square().sum())) / (count - 1)
        found["step"].append(step)
        found["trace"].append(trace)
        found["norm_sq"].append(float(mean.square().sum()) - trace / count)  # unbiased
        found["mean"].append(mean)
    return found


def same_mean(first: dict[str, Any], second: dict[str, Any], count: int) -> list[float]:
    """Per point, |difference of the mean gradients|^2 over what noise alone would give: about 1 for the same mean."""
    ratios = []
    for i in range(len(first["step"])):
        gap = float((first["mean"][i] - second["mean"][i]).square().sum())
        ratios.append(gap / ((first["trace"][i] + second["trace"][i]) / count))
    return ratios


def along(size: Size, images: Tensor, seed: int, engine: str) -> dict[str, Any]:
    """Variances of all estimators at points of one pathwise run."""
    points: dict[int, Tensor] = {}

    def keep(fit: bc.Fit) -> dict[str, Any]:
        points[fit.state.step] = fit.x.clone()
        return {}

    marks = sorted({max(1, round(size.steps * share)) for share in (0.01, 0.1, 1.0)})
    train(pair("pathwise", seed), (images,), marks, keep, **settings(size, seed, "pathwise", engine))
    found = {name: variances(name, points, images, size, seed) for name in OBJECTIVES}
    ratios = {name: same_mean(found["pathwise"], found[name], size.gradients) for name in OBJECTIVES}
    for each in found.values():
        del each["mean"]
    return {"estimators": found, "difference_of_means_over_noise": ratios}


def settings(size: Size, seed: int, name: str, engine: str) -> dict[str, Any]:
    """Of a fit by one estimator."""
    return {
        "minibatch": bc.Minibatch(size.batch, plate="data"),
        "objective": OBJECTIVES[name](size.draws),
        "optimiser": bc.Adam(bc.Constant(1e-3)),
        "seed": seed,
        "engine": engine,
        "num_gradients": 4,
    }


def by_each(name: str, size: Size, images: Tensor, seed: int, engine: str) -> dict[str, Any]:
    """A run by one estimator: bounds at its looks, and at the end on all images."""
    fit, _ = train(pair(name, seed), (images,), [size.steps], **settings(size, seed, name, engine))
    bound = bc.evaluate.elbo(fit, (images[:1000],), num_particles=20).population
    return {"looks": looks(fit), "bound": bound.to_json(), "steps_seconds": fit.seconds["steps"]}


def picture(variance: dict[str, Any], runs: dict[str, dict[str, Any]]) -> Figure:
    """Traces along the run, and the bounds of the runs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, each in variance["estimators"].items():
        left.loglog(each["step"], each["trace"], "o-", label=name)
    for name, each in runs.items():
        right.semilogx([s + 1 for s in each["looks"]["step"]], each["looks"]["bound"][0], label=name)
    left.set_ylabel("trace of the covariance of one gradient for phi")
    right.set_ylabel("bound, nats an image")
    for axis in (left, right):
        axis.set_xlabel("step n")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return figure


def run(
    out: Annotated[Path, typer.Option(help="folder for the figure and results.json")],
    quick: Annotated[bool, typer.Option("--quick", help="few images, steps and gradients, for a test")] = False,
    engine: Annotated[str, typer.Option(help="of the steps")] = "auto",
    seed: Annotated[int, typer.Option(help="of starts, rows and noise", min=0)] = 0,
) -> None:
    """Compare the estimators and write results.json."""
    size = SIZES["quick" if quick else "default"]
    (images,) = load_module("vae").data()
    images = images[: size.images]
    cells = Cells(out, {"preset": "quick" if quick else "default", "seed": seed, **asdict(size)})
    variance = cells.get("variances", lambda: along(size, images, seed, engine))
    runs = {
        name: cells.get(name.replace(" ", "_"), lambda n=name: by_each(n, size, images, seed, engine))  # type: ignore[misc]
        for name in OBJECTIVES
    }
    picture(variance, runs).savefig(out / "estimators.png", dpi=130)
    cells.conclude({"variances": variance, "runs": runs})
    for name, each in variance["estimators"].items():
        ratio = each["trace"][-1] / variance["estimators"]["pathwise"]["trace"][-1]
        typer.echo(f"{name:>20}: variance {ratio:.3g} of the pathwise, bound {runs[name]['bound']['value']:.2f}")


if __name__ == "__main__":
    typer.run(run)
