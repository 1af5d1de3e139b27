"""A VAE from first principles: reparameterised against score-function gradients, closed-form KL against Monte Carlo.

    python examples/gradient_estimators.py --out runs/gradient_estimators
    python examples/gradient_estimators.py --out runs/quick --quick

For the VAE of Kingma and Welling on MNIST, four estimators of one and the same gradient: pathwise, sticking the
landing, pathwise with the KL in closed form, and the score function with a leave-one-out baseline. At points along one
run, the trace of the covariance of each, the bias of each against the pathwise one, and its smoothness: how much the
gradient changes with the run's next step, per unit of that step, for one estimate on fixed noise and in expectation.
Then a run by each. Sources: Kingma and Welling (2014), https://arxiv.org/abs/1312.6114; Roeder et al. (2017),
https://arxiv.org/abs/1703.09194; Ranganath et al. (2014), https://arxiv.org/abs/1401.0118; Surendran et al. (2025)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pyro
import pyro.distributions as dist
import typer
from cells import Cells, preset
from matplotlib.figure import Figure
from torch import Tensor
from vae_lab.training import looks, train

import bbvi_conv as bc
from bbvi_conv.engine import Calculus, Stream
from bbvi_conv.families.mean_field import ScoredNormal
from bbvi_conv.model_file import load_module
from bbvi_conv.monitor.signal import no_moments
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


Points = dict[int, tuple[Tensor, Tensor]]
"""Per step of a run, its iterate and the next one."""


def moments(name: str, points: Points, images: Tensor, size: Size, seed: int) -> dict[str, Any]:
    """Of one gradient for phi at every point, on rows and noise common to all estimators: trace of the covariance,
    squared norm and value of the mean, and smoothness."""
    program = bc.build(*pair(name, seed), (images,), minibatch=bc.Minibatch(size.batch, plate="data"))
    objective = OBJECTIVES[name](size.draws)
    if objective.analytic_kl:
        program.analytic = closed_form_sites(program)
    calculus = Calculus(program, objective, TracedLogWeights(program), float(len(images)))
    part = program.groups["phi"]
    names = ("step", "trace", "norm_sq", "smoothness", "mean_smoothness", "mean")
    found: dict[str, Any] = {name: [] for name in names}
    for step, (x, following) in points.items():
        here = change = no_moments(part.stop - part.start)
        for key in range(0, size.gradients, 16):
            feed = Stream(program, seed, f"compare {step}", size.draws).once(key, 16)
            gradients = calculus.gradients(x, feed)[0][:, part].double()
            here = here.add(gradients)
            change = change.add(calculus.gradients(following, feed)[0][:, part].double() - gradients)
        length = float((following - x).double().norm())
        norm_sq, trace = here.squared_norm()
        one, mean = float(change.squares.sum()) / change.number, max(change.squared_norm()[0], 0.0)
        values = (step, trace, norm_sq, one**0.5 / length, mean**0.5 / length, here.mean)
        for name, value in zip(names, values, strict=True):
            found[name].append(value)
    return found


def same_mean(first: dict[str, Any], second: dict[str, Any], count: int) -> list[float]:
    """Per point, |difference of the mean gradients|^2 over what noise alone would give: about 1 for the same mean."""
    ratios = []
    for i in range(len(first["step"])):
        gap = float((first["mean"][i] - second["mean"][i]).square().sum())
        ratios.append(gap / ((first["trace"][i] + second["trace"][i]) / count))
    return ratios


def along(size: Size, images: Tensor, seed: int, engine: str) -> dict[str, Any]:
    """Moments of all estimators at points of one pathwise run."""
    iterates: dict[int, Tensor] = {}

    def keep(fit: bc.Fit) -> dict[str, Any]:
        iterates[fit.state.step] = fit.x.clone()
        return {}

    marks = sorted({max(1, round(size.steps * share)) for share in (0.01, 0.1, 1.0)})
    both = sorted({*marks, *(mark + 1 for mark in marks)})
    train(pair("pathwise", seed), (images,), both, keep, **settings(size, seed, "pathwise", engine))
    points = {mark: (iterates[mark], iterates[mark + 1]) for mark in marks}
    found = {name: moments(name, points, images, size, seed) for name in OBJECTIVES}
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
    """Traces and smoothness along the run, and the bounds of the runs."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, each in variance["estimators"].items():
        left.loglog(each["step"], each["trace"], "o-", label=name)
        (line,) = middle.loglog(each["step"], each["smoothness"], "o-", label=name)
        middle.loglog(each["step"], each["mean_smoothness"], "--", color=line.get_color())
    for name, each in runs.items():
        right.semilogx([s + 1 for s in each["looks"]["step"]], each["looks"]["bound"][0], label=name)
    left.set_ylabel("trace of the covariance of one gradient for phi")
    middle.set_ylabel("|change of the gradient| / |step| (dashed: of its mean)")
    right.set_ylabel("bound, nats an image")
    for axis in (left, middle, right):
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
    chosen = preset(quick)
    size = SIZES[chosen]
    (images,) = load_module("vae").data()
    images = images[: size.images]
    cells = Cells(out, {"preset": chosen, "seed": seed, **asdict(size)})
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
