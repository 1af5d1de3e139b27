"""Figures of a model of images show what the model says: pixels of the panels against means computed here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bbvi_conv import images

WEIGHTS = torch.linspace(-1, 1, 2 * 16).reshape(2, 16)
DATA = torch.rand(12, 16, generator=torch.Generator().manual_seed(0))


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((z @ WEIGHTS).sigmoid(), 0.1).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :2], 1e-6).to_event(1))


def panels(figure: Any) -> np.ndarray:
    return np.stack([np.asarray(axis.images[0].get_array()) for axis in figure.axes])


def test_reconstructions_stand_under_their_data() -> None:
    shown = panels(images.reconstructions((model, guide), DATA, count=5))
    np.testing.assert_allclose(shown[:5].reshape(5, 16), DATA[:5].numpy(), atol=1e-6)
    wanted = (DATA[:5, :2] @ WEIGHTS).sigmoid()
    np.testing.assert_allclose(shown[5:].reshape(5, 16), wanted.numpy(), atol=1e-4)


def test_samples_come_from_the_prior() -> None:
    """The means are those of latents with the prior's spread, not the guide's: recovered by inverting the decoder."""
    figure = images.samples((model, guide), DATA, rows=30, columns=10)
    logits = np.log(panels(figure).reshape(-1, 16)) - np.log1p(-panels(figure).reshape(-1, 16))
    z = logits @ np.linalg.pinv(WEIGHTS.numpy())
    assert z.shape == (300, 2)
    assert (np.abs(z.mean(0)) < 4 / 300**0.5).all()
    assert (np.abs(z.std(0) - 1) < 4 / 600**0.5).all()


def test_traversals_move_one_coordinate() -> None:
    shown = panels(images.traversals((model, guide), DATA, columns=5)).reshape(2, 5, 16)
    for j in range(2):
        z = DATA[:1, :2].repeat(5, 1)
        z[:, j] = torch.linspace(-3, 3, 5)
        np.testing.assert_allclose(shown[j], (z @ WEIGHTS).sigmoid().numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="no latent site 'y'; the sites are z"):
        images.traversals((model, guide), DATA, site="y")


def test_what_is_no_image_is_refused() -> None:
    assert images.as_images(torch.zeros(2, 3, 4, 4)).shape == (2, 4, 4, 3)
    assert images.as_images(torch.zeros(2, 48)).shape == (2, 4, 4, 3)
    assert images.as_images(torch.zeros(2, 1, 4, 4)).shape == (2, 4, 4)
    with pytest.raises(ValueError, match=r"shape \(2, 7\) are no images"):
        images.as_images(torch.zeros(2, 7))
