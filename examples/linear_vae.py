"""The linear VAE on MNIST against probabilistic PCA, in closed form; linear and deep autoencoders beside it.

    python examples/linear_vae.py --out runs/linear_vae
    python examples/linear_vae.py --out runs/quick --quick

The subspace, noise, likelihood and encoder found by stochastic gradients on the ELBO are laid beside what probabilistic
PCA gives in closed form, with a full and with a factorised guide, with the noise learned and fixed to 1; the subspace
also beside that of an orthogonal linear autoencoder. Last, a VAE with a two-dimensional latent and a nonlinear decoder,
whose posteriors on a grid are not Gaussian. Every cell is kept as it is measured.
Sources: Tipping and Bishop (1999); Lucas et al. (2019), https://arxiv.org/abs/1911.02469; Kingma and Welling (2014).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from cells import Cells, bar, preset
from matplotlib.figure import Figure
from torch import Tensor, nn
from vae_lab.autoencoders import deep, orthogonal
from vae_lab.posteriors import Posterior, posterior
from vae_lab.training import networks_from, train

import bbvi_conv as bc
from bbvi_conv.data import mnist
from bbvi_conv.model_file import load_module
from bbvi_conv.monitor.strata import Strata


@dataclass(frozen=True)
class Size:
    """How much work a run does: images, latent dimensions, steps of each kind, posteriors shown, draws of a look."""

    images: int
    latent: int
    steps: int
    deep_steps: int
    grid_steps: int
    grids: int
    gradients: int = 32


SIZES = {"quick": Size(2_000, 2, 1_000, 60, 100, 2, 4), "default": Size(60_000, 5, 12_000, 3_000, 6_000, 50)}
BARS = {
    "max_principal_angle_deg": 1.0,
    "sigma2_rel_error": 0.02,
    "loglik_gap_per_datum": 0.01,
    "encoder_rel_error": 0.02,
}
STEP = {"learned": 2e-3, "factorised": 2e-3, "unit_noise": 3e-2}
"""Step sizes of SGD at the start: about one over the largest curvature."""


def angles(first: Tensor, second: Tensor) -> Tensor:
    """Principal angles between the spans of two matrices ``(D, d)``, in degrees."""
    a, b = (torch.linalg.qr(each.double()).Q for each in (first, second))
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(max=1)  # of small angles a sine knows more than a cosine
    return torch.rad2deg(torch.arcsin(sines))


@dataclass(frozen=True)
class Study:
    """Data, their moments and PCA's answer, shared by all cells."""

    size: Size
    seed: int
    module: ModuleType
    images: Tensor
    mean: Tensor
    covariance: Tensor

    def best(self, sigma2: float | None = None) -> Any:
        """The likeliest decoder."""
        return self.module.pca(self.mean, self.covariance, self.size.latent, sigma2)


def linear(study: Study, kind: str) -> dict[str, Any]:
    """Fit the linear VAE by SGD on the ELBO and lay it beside the closed form."""
    sigma2 = 1.0 if kind == "unit_noise" else None
    fit, _ = train(
        study.module.vae(study.size.latent, sigma2, factorised=kind == "factorised"),
        (study.images, study.mean.float()),
        [study.size.steps],
        minibatch=bc.Minibatch(256, plate="data"),
        objective=bc.ELBO(estimator="sticking-the-landing"),
        optimiser=bc.SGD(bc.CosineDecay(STEP[kind], study.size.steps, final=0.003)),
        seed=study.seed,
        engine="auto",
        num_gradients=study.size.gradients,
    )
    found = compare(study, {name: value.double() for name, value in fit.constrained_params.items()}, sigma2)
    looks = fit.state.monitor.looks
    found["curve"] = {
        "step": [look.step for look in looks],
        "bound_per_datum": [look.bound for look in looks],
        "gradient_norm_sq": [look.total.value for look in looks],
    }
    return found


def compare(study: Study, values: dict[str, Tensor], sigma2: float | None) -> dict[str, Any]:
    """Errors of fitted parameters against the closed forms; relative ones in the Frobenius norm."""
    module, best = study.module, study.best(sigma2)
    own = module.Decoder(values["W"], values["mu"], best.sigma2 if sigma2 else values["sigma2"])
    slope, spread = module.posterior(own)
    scale = torch.diag(values["s"]) if "s" in values else values["L"]
    evidence = [float(module.mean_log_evidence(each, study.mean, study.covariance)) for each in (best, own)]
    error = values["V"] - slope

    def size_over_data(matrix: Tensor) -> float:
        return float((matrix @ study.covariance @ matrix.T).trace().sqrt())

    encoder = {
        "slope": float(error.norm() / slope.norm()),
        "covariance": float((scale @ scale.T - spread).norm() / spread.norm()),
        "means_over_data": size_over_data(error) / size_over_data(slope),
    }
    gram = own.W.T @ own.W
    return {
        "max_principal_angle_deg": float(angles(own.W, best.W).max()),
        "sigma2": {"found": float(own.sigma2), "pca": float(best.sigma2)},
        "sigma2_rel_error": abs(float(own.sigma2 / best.sigma2) - 1),
        "loglik_per_datum": {"found": evidence[1], "pca": evidence[0]},
        "loglik_gap_per_datum": evidence[0] - evidence[1],
        "encoder": encoder,
        "encoder_rel_error": max(encoder["slope"], encoder["covariance"]),
        "off_diagonal_of_gram": float((gram - gram.diagonal().diag()).norm() / gram.norm()),
    }


def autoencoders(study: Study) -> dict[str, Any]:
    """Subspace and squared error of the orthogonal linear autoencoder, and the error of a deep one, beside PCA's."""
    x, latent = study.module.pixels(study.images).float(), study.size.latent
    u = orthogonal(x, study.mean.float(), latent, study.size.steps // 2, 256, study.seed).double()
    values = torch.linalg.eigvalsh(study.covariance).flip(0)
    error = float(study.covariance.trace() - (u.T @ study.covariance @ u).trace())
    best = study.best()
    slope, _ = study.module.posterior(best)
    rest = torch.eye(len(study.mean), dtype=torch.float64) - best.W @ slope
    return {
        "max_principal_angle_deg": float(angles(u, best.W).max()),
        "squared_error": {
            "pca": float(values[latent:].sum()),
            "orthogonal linear autoencoder": error,
            "linear VAE, posterior means": float((rest @ study.covariance @ rest.T).trace()),
            "deep autoencoder": deep(x, 256, latent, study.size.deep_steps, 256, study.seed),
        },
    }


def curved(study: Study, out: Path) -> dict[str, Any]:
    """Posteriors of a two-dimensional latent under a nonlinear decoder: how far from Gaussian, on a grid."""
    module = load_module("deep_gaussian_vae", seed=study.seed)
    encoder, decoder = networks_from(study.seed, lambda: (_encoder(module), _decoder(module)))
    steps = study.size.grid_steps
    train(
        module.vae(encoder, decoder, 2),
        (study.images,),
        [steps],
        minibatch=bc.Minibatch(128, plate="data"),
        optimiser=bc.Adam(bc.CosineDecay(2e-3, steps, final=0.01)),
        seed=study.seed,
        engine="auto",
        strata=Strata(min_length=steps, growth=0.5),
        num_gradients=4,
    )
    images = module.pixels(study.images[: study.size.grids])
    found = [posterior(decoder, image, module.SCALE) for image in images]
    save(picture(found[:6]), out / "posteriors.png")
    kl = torch.tensor([each.kl_to_gaussian for each in found])
    return {
        "kl_to_gaussian_nats": {"mean": float(kl.mean()), "least": float(kl.min()), "largest": float(kl.max())},
        "images": len(found),
        "mean_log_evidence": float(torch.tensor([each.log_evidence for each in found]).mean()),
    }


def _encoder(module: ModuleType) -> nn.Module:
    return module.plain(module.PIXELS, 256, 4)  # type: ignore[no-any-return]


def _decoder(module: ModuleType) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, module.PIXELS))


def picture(found: list[Posterior]) -> Figure:
    """Densities on their grids."""
    figure = Figure(figsize=(3 * len(found), 3.2), layout="constrained")
    figure.suptitle("Posteriors p(z | x) of a two-dimensional latent, exact on a grid")
    for axis, each in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        x, y = (a.numpy() for a in each.axes)
        axis.contourf(x, y, each.density.T.numpy(), levels=12, cmap="Blues")
        axis.set_title(f"KL to Gaussian {each.kl_to_gaussian:.3f} nats", fontsize=8)
    return figure


def curves(cells: dict[str, dict[str, Any]], best: dict[str, float]) -> Figure:
    """The bound of each linear VAE against the likelihood of PCA, and its squared gradient norm."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, cell in cells.items():
        step = [s + 1 for s in cell["curve"]["step"]]
        short = [max(best[name] - bound, 1e-4) for bound in cell["curve"]["bound_per_datum"]]
        left.loglog(step, short, label=name)
        right.loglog(step, [max(u, 1e-8) for u in cell["curve"]["gradient_norm_sq"]], label=name)
    left.set_ylabel("likelihood of PCA less the bound, nats per datum")
    right.set_ylabel("squared gradient norm, per datum")
    for axis in (left, right):
        axis.set_xlabel("step n")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG."""
    figure.savefig(path, dpi=130)


def run(
    out: Annotated[Path, typer.Option(help="folder for the figures and results.json")],
    quick: Annotated[bool, typer.Option("--quick", help="few images and steps, for a test: bars are not met")] = False,
    seed: Annotated[int, typer.Option(help="of starts, rows and noise", min=0)] = 0,
) -> None:
    """Lay linear VAEs and autoencoders beside PCA, and write results.json."""
    chosen = preset(quick)
    size = SIZES[chosen]
    module = load_module("linear_vae")
    images = mnist("train")[0][: size.images]
    study = Study(size, seed, module, images, *module.moments(images))
    cells = Cells(out, {"preset": chosen, "seed": seed, **asdict(size)})
    found = {kind: cells.get(kind, lambda kind=kind: linear(study, kind)) for kind in STEP}  # type: ignore[misc]
    save(curves(found, {kind: cell["loglik_per_datum"]["pca"] for kind, cell in found.items()}), out / "curves.png")
    results = {key: found["learned"][key] for key in BARS}
    results["bars"] = {key: bar(found["learned"][key], limit) for key, limit in BARS.items()}
    results |= {"linear": found, "autoencoders": cells.get("autoencoders", lambda: autoencoders(study))}
    results["two_dimensional"] = cells.get("two_dimensional", lambda: curved(study, out))
    cells.conclude(results)
    for key, each in results["bars"].items():
        typer.echo(f"{key}: {each['value']:.4g}, bar {each['at_most']:g}: {'met' if each['met'] else 'missed'}")


if __name__ == "__main__":
    typer.run(run)
