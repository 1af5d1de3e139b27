"""Approximation and amortization gaps: on the linear VAE against closed forms, and on MNIST.

    python examples/inference_gaps.py --out runs/inference_gaps
    python examples/inference_gaps.py --out runs/quick --quick

On the linear VAE with a factorised encoder both gaps are known exactly. On MNIST log p(x) is taken to be the larger of
annealed importance sampling and importance sampling with 5,000 draws; q* of each image comes from variational EM, by
pathwise and by score-function gradients; and for a few images a flow takes the place of the Gaussian factors.
Source: Cremer, Li and Duvenaud (2018), "Inference suboptimality in variational autoencoders",
https://arxiv.org/abs/1801.03558
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cells import Cells, preset
from torch import Tensor
from vae_lab.training import interval, train

import bbvi_conv as bc
from bbvi_conv.data import mnist
from bbvi_conv.evaluate import LogLikelihood, PerDatum
from bbvi_conv.model_file import load_module


@dataclass(frozen=True)
class Size:
    """How much work a run does."""

    linear_steps: int
    linear_draws: int
    steps: int
    images: int
    draws: int
    chains: int
    temperatures: int
    e_steps: int
    flows: int
    flow_steps: int


SIZES = {
    "quick": Size(300, 4_000, 60, 8, 200, 4, 10, 200, 1, 60),
    "default": Size(1_500, 100_000, 20_000, 100, 5_000, 16, 300, 4_000, 8, 20_000),
}
BAR = 0.01
LATENT = 3


def linear(size: Size, seed: int, engine: str) -> dict[str, Any]:
    """Both gaps of a factorised encoder that was stopped early, against their closed forms, over 64 test images."""
    module = load_module("linear_vae", seed=seed)
    images = mnist("train")[0]
    centre = images.flatten(1).double().mean(0).float() / 255
    fit, _ = train(
        module.vae(LATENT, factorised=True),
        (images, centre),
        [size.linear_steps],
        minibatch=bc.Minibatch(256, plate="data"),
        objective=bc.ELBO(estimator="sticking-the-landing"),
        optimiser=bc.SGD(bc.Constant(1e-3)),
        engine=engine,
        seed=seed,
        num_gradients=4,
    )
    test = mnist("test")[0][:64]
    data = (test, centre)
    log_p = bc.evaluate.log_likelihood(fit, data, num_particles=size.linear_draws, batch=64, seed=seed)
    em = bc.VariationalEM(tol=1e-4, max_steps=size.e_steps, engine=engine, seed=seed)
    found = bc.evaluate.inference_gaps(fit, data, log_p, em=em, num_particles=size.linear_draws, seed=seed)
    values = {name: value.double() for name, value in fit.constrained_params.items()}
    x = module.pixels(test).double()
    precision = values["W"].T @ values["W"] / values["sigma2"] + torch.eye(LATENT, dtype=torch.float64)
    slope, _ = module.posterior(module.Decoder(values["W"], values["mu"], values["sigma2"]))
    away = (x - centre) @ values["V"].T + values["c"] - (x - values["mu"]) @ slope.T
    widths = precision.diagonal() * values["s"].square()
    exact = {
        "approximation": 0.5 * float(precision.diagonal().log().sum() - torch.linalg.slogdet(precision).logabsdet),
        "amortization": float(
            0.5 * ((away @ precision) * away).sum(-1).mean() + 0.5 * (widths - 1 - widths.log()).sum()
        ),
    }
    gaps = {"approximation": found.approximation, "amortization": found.amortization}
    rows = {
        name: {
            "found": gaps[name].mean.to_json(),
            "exact": exact[name],
            "error": abs(float(gaps[name].values.mean()) - exact[name]),
        }
        for name in gaps
    }
    return {"gaps": rows, "converged": found.converged, "met": all(row["error"] <= BAR for row in rows.values())}


def digits(size: Size, seed: int, engine: str) -> dict[str, Any]:
    """The gaps of the Bernoulli VAE on test images, with a flow in the place of Gaussian factors for a few of them."""
    module = load_module("bernoulli_vae", seed=seed)
    fit, _ = train(
        (module.model, module.guide),
        module.data(),
        [size.steps],
        minibatch=bc.Minibatch(100, plate="data"),
        objective=bc.ELBO(1),
        optimiser=bc.Adam(bc.CosineDecay(1e-3, size.steps, final=0.01), eps=1e-4),
        engine=engine,
        seed=seed,
        num_gradients=4,
    )
    codes, *others = module.held_out()
    data = (codes[: size.images], *others)
    sampled = bc.evaluate.log_likelihood(fit, data, num_particles=size.draws, seed=seed)
    annealed = bc.evaluate.annealed_log_likelihood(
        fit, data, num_chains=size.chains, num_temperatures=size.temperatures, seed=seed
    )
    log_p = sampled.larger(annealed)
    em = bc.VariationalEM(max_steps=size.e_steps, engine=engine, seed=seed)
    found = bc.evaluate.inference_gaps(fit, data, log_p, em=em, num_particles=max(100, size.draws // 5), seed=seed)
    gaps = {"approximation": found.approximation, "amortization": found.amortization, "inference": found.inference}
    return {
        "log_p": {
            "importance sampling": sampled.population.to_json(),
            "annealing": annealed.population.to_json(),
            "larger": log_p.population.to_json(),
            "annealing_larger": float((annealed.values > sampled.values).double().mean()),
        },
        "gaps": {name: {**gap.population.to_json(), "sign": sign(gap)} for name, gap in gaps.items()},
        "converged": found.converged,
        "by_score_function": by_score(fit, data, size, seed, engine),
        "flow": flows(fit, data, log_p, found.best, size, seed, engine),
    }


def sign(gap: PerDatum) -> str:
    """Of the mean over images like these, where its interval tells."""
    mean = gap.population
    if mean.low is None or mean.high is None:
        return "unknown"
    return "positive" if mean.low > 0 else "negative" if mean.high < 0 else "not told from zero"


def by_score(fit: bc.Fit, data: tuple[Tensor, ...], size: Size, seed: int, engine: str) -> dict[str, Any]:
    """The E-step by the score function, until parameters converge: the bound it comes to with as many steps."""
    few = (data[0][: max(4, size.flows)], *data[1:])
    bounds = {}
    for gradient in ("pathwise", "score-function"):
        em = bc.VariationalEM(
            gradient=gradient,  # type: ignore[arg-type]
            until="parameters",
            num_particles=16,
            max_steps=size.e_steps,
            engine=engine,
            seed=seed,
        )
        factors = em.e_step(fit, few)
        bounds[gradient] = {
            "bound": factors.history[-1][1],
            "steps": factors.steps,
            "converged": factors.converged,
        }
    return bounds


def flows(
    fit: bc.Fit, data: tuple[Tensor, ...], log_p: LogLikelihood, best: PerDatum, size: Size, seed: int, engine: str
) -> dict[str, Any]:
    """Approximation gaps of a flow, fitted to one image at a time, beside those of the Gaussian factors.

    The flow starts with the encoder's location and scale. A gap below zero says that log p(x) was estimated too low.
    """
    em = bc.VariationalEM(
        family=bc.IAF(limit=4.0),
        step_size=0.01,
        tol=1e-2,
        window=max(20, size.flow_steps // 10),
        max_steps=size.flow_steps,
        engine=engine,
        seed=seed,
    )
    rows = []
    for i in range(size.flows):
        one = (data[0][i : i + 1], *data[1:])
        found = bc.evaluate.inference_gaps(fit, one, log_p.part(i, i + 1), em=em, num_particles=2000, seed=seed)
        gaussian = float(log_p.values[i] - best.values[i])
        rows.append({"gaussian": gaussian, "flow": float(found.approximation.values), "converged": found.converged})
    gain = torch.tensor([row["gaussian"] - row["flow"] for row in rows])
    gained = interval(gain) if len(rows) > 1 else {"value": float(gain)}
    return {"images": rows, "gain_nats": gained, "shrinks": gained.get("low", gained["value"]) > 0}


def run(
    out: Annotated[Path, typer.Option(help="folder for results.json")],
    quick: Annotated[bool, typer.Option("--quick", help="few steps and images, for a test")] = False,
    engine: Annotated[str, typer.Option(help="of the steps")] = "auto",
    seed: Annotated[int, typer.Option(help="of starts, rows and noise", min=0)] = 0,
) -> None:
    """Measure the gaps and write results.json."""
    chosen = preset(quick)
    size = SIZES[chosen]
    cells = Cells(out, {"preset": chosen, "seed": seed, **asdict(size)})
    results = {
        "linear": cells.get("linear", lambda: linear(size, seed, engine)),
        "mnist": cells.get("mnist", lambda: digits(size, seed, engine)),
    }
    cells.conclude(results)
    for name, row in results["linear"]["gaps"].items():
        typer.echo(f"linear, {name}: {row['found']['value']:.4f}, exact {row['exact']:.4f}")
    for name, gap in results["mnist"]["gaps"].items():
        typer.echo(f"MNIST, {name}: {gap['value']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}], {gap['sign']}")


if __name__ == "__main__":
    typer.run(run)
