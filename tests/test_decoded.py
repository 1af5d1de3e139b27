"""Figures of what a decoder makes of latents: pixels and bars are those of the model, for the rows claimed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.decoded import NoFigure
from bbvi_conv.model_file import ModelFile, load_model
from bbvi_conv.report import render

FILES = Path(__file__).parent / "files"
OF_IMAGES = ("reconstructions", "samples", "traversals")


def fitted(found: ModelFile, **changes: Any) -> bc.Fit:
    settings = {
        "max_steps": 150,
        "khat_draws": 50,
        "num_gradients": 4,
        "engine": "traced",
        "progress": False,
        **changes,
    }
    return bc.fit(found.model, found.guide, found.args, **{**found.defaults, **settings})


@pytest.fixture(scope="module")
def file() -> ModelFile:
    return load_model(str(FILES / "overfit.py"), held_out=True)


@pytest.fixture(scope="module")
def fit(file: ModelFile) -> bc.Fit:
    return fitted(file, held_out=file.held_out)


def panels(figure: Figure) -> np.ndarray:
    return np.stack([np.asarray(axis.images[0].get_array()) for axis in figure.axes])


def decoded(fit: bc.Fit, z: Tensor) -> np.ndarray:
    """Mean images at latents ``(B, d)``."""
    values = fit.params["theta"]
    hidden = torch.tanh(z @ values["decoder$$$0.weight"].T + values["decoder$$$0.bias"])
    return (hidden @ values["decoder$$$2.weight"].T + values["decoder$$$2.bias"]).sigmoid().numpy()


def latents_of(fit: bc.Fit, images: np.ndarray) -> Tensor:
    """The latents whose mean images these are, by least squares on the decoder's hidden layer and its inverse."""
    values = fit.params["theta"]
    target = torch.logit(torch.tensor(images)).double()
    w1, b1, w0, b0 = (values[f"decoder$$${name}"].double() for name in ("2.weight", "2.bias", "0.weight", "0.bias"))
    hidden = torch.linalg.lstsq(w1, (target - b1).T).solution.T
    return torch.linalg.lstsq(w0, (torch.atanh(hidden) - b0).T).solution.T.float()


def test_held_out_rows_are_reconstructed(fit: bc.Fit, file: ModelFile) -> None:
    shown = panels(fit.plot("reconstructions"))
    assert file.held_out is not None
    np.testing.assert_array_equal(shown[:10].reshape(10, -1), file.held_out[0][:10].numpy())
    made = shown[10:].reshape(10, -1)
    z = latents_of(fit, made)
    np.testing.assert_allclose(decoded(fit, z), made, atol=1e-4)  # power: they are images the decoder can make
    with torch.no_grad():
        loc, log_scale = fit.program.guide.__globals__["encoder"](file.held_out[0][:10]).chunk(2, -1)
    scores = (z - loc) / log_scale.exp()
    assert float(scores.abs().max()) < 5  # 40 draws of N(0, 1)
    assert 0.5 < float(scores.square().mean()) < 1.9


def test_training_rows_are_shown_where_nothing_is_held_out(file: ModelFile) -> None:
    alone = fitted(file, held_out=None, max_steps=20)
    figure = alone.plot("reconstructions")
    np.testing.assert_array_equal(panels(figure)[:10].reshape(10, -1), file.args[0][:10].numpy())
    assert "training rows" in figure.get_suptitle()


def test_samples_are_decoded_from_the_prior(fit: bc.Fit) -> None:
    made = panels(fit.plot("samples")).reshape(40, -1)
    z = latents_of(fit, made)
    np.testing.assert_allclose(decoded(fit, z), made, atol=1e-4)
    assert (z.mean(0).abs() < 4 / 40**0.5).all()
    assert ((z.std(0) - 1).abs() < 4 / 80**0.5).all()


def test_bars_are_the_kl_of_each_latent(fit: bc.Fit, file: ModelFile) -> None:
    used = bc.evaluate.latents(fit, file.held_out, num_samples=4, batch=500)
    (axis,) = fit.plot("latents").axes
    heights = sorted((bar.get_height() for bar in axis.patches), reverse=True)
    np.testing.assert_allclose(heights, used.kl["z"].sort(descending=True).values.numpy(), rtol=1e-6)
    assert f"z: {used.active['z']} of 4 active" in axis.get_title()


def test_traversals_follow_active_latents(fit: bc.Fit) -> None:
    used = fit.use_of_latents
    order = [j for j in used.kl["z"].argsort(descending=True).tolist() if used.activity["z"][j] > used.threshold]
    assert order  # power: some are active
    figure = fit.plot("traversals")
    titles = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert titles == [f"z[{j}]" for j in order]
    z = latents_of(fit, panels(figure).reshape(len(order) * 9, -1)).reshape(len(order), 9, 4)
    for row, j in enumerate(order):
        np.testing.assert_allclose(z[row, :, j], np.linspace(-3, 3, 9), atol=0.05)
        others = [k for k in range(4) if k != j]
        assert float(z[row][:, others].std(0).max()) < 0.05


def test_the_report_holds_them_all(fit: bc.Fit) -> None:
    page = render(fit)
    for kind in (*OF_IMAGES, "latents", "bound"):
        assert f'<figure id="{kind}">' in page


# Fits that have none


def whole(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_model_without_latents_of_single_data_has_none() -> None:
    fit = bc.fit(whole, args=(torch.zeros(4),), max_steps=20, khat_draws=50, progress=False)
    for kind in (*OF_IMAGES, "latents"):
        with pytest.raises(NoFigure, match="its latents are not those of single data"):
            fit.plot(kind)


def test_a_model_of_no_images_has_bars_alone() -> None:
    found = load_model(str(FILES / "amortized.py"))
    fit = fitted(found, minibatch=bc.Minibatch(16, plate="data"), max_steps=20)
    for kind in OF_IMAGES:
        with pytest.raises(NoFigure, match="the observed site 'x' holds 4 numbers a row, too few for an image"):
            fit.plot(kind)
    page = render(fit)
    assert '<figure id="latents">' in page
    assert not any(f'<figure id="{kind}">' in page for kind in OF_IMAGES)


def pictured(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.mean(-1)[:, None, None] * x.new_ones(8, 8), 1.0).to_event(2), obs=x)


def correlated(x: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        loc = slope * x.flatten(1)[:, :2]
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=torch.eye(2) * 0.5))


def test_other_reasons_and_a_guide_that_is_no_product() -> None:
    x = torch.rand(30, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"minibatch": bc.Minibatch(10, plate="data"), "max_steps": 20, "khat_draws": 50, "progress": False}
    fit = bc.fit(pictured, correlated, (x,), **settings)
    with pytest.raises(NoFigure, match="cannot be told apart: the law of site 'z' is no product"):
        fit.plot("latents")
    titles = [axis.get_ylabel() for axis in fit.plot("traversals").axes if axis.get_ylabel()]
    assert titles == ["z[0]", "z[1]"]  # all there are, where none is known to be active
    outside = bc.fit(pictured, correlated, (3 * x,), **settings)
    with pytest.raises(NoFigure, match=r"holds values outside \[0, 1\]"):
        outside.plot("samples")
