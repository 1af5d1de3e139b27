"""Networks whose steps change more than parameters: running averages belong to a fit, where it is read or goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bbvi_conv as bc

DATA = 5 + 3 * torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {
    "minibatch": bc.Minibatch(20, plate="data"),
    "max_steps": 40,
    "window": 20,
    "khat_draws": 25,
    "progress": False,
    "optimiser": bc.Adam(bc.Constant(0.01)),
}


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.decoder = nn.Linear(1, 4)

    def model(self, x: Tensor) -> None:
        pyro.module("autoencoder", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("autoencoder", self)
        loc, scale = self.encoder(x).split(1, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    @property
    def averages(self) -> nn.BatchNorm1d:
        return self.encoder[1]  # type: ignore[return-value]


def fitted(network: Autoencoder, data: Tensor = DATA, **settings: Any) -> bc.Fit:
    return bc.fit(network.model, network.guide, args=(data,), **{**SETTINGS, **settings})


def as_it_serves(network: Autoencoder, fit: bc.Fit) -> float:
    """Mean log-likelihood with the running averages in place of a batch's own."""
    network.eval()
    found = bc.evaluate.log_likelihood(fit, (DATA,), num_particles=20).mean.value
    network.train()
    assert found is not None
    return found


def test_a_loaded_fit_has_them(tmp_path: Path) -> None:
    network, other = Autoencoder(), Autoencoder()
    fit = fitted(network, out=tmp_path / "run")
    assert int(network.averages.num_batches_tracked) == 40  # those of steps, none of looks, checks or figures
    loaded = bc.load(tmp_path / "run", model=other.model, guide=other.guide, args=(DATA,))
    assert torch.equal(loaded.x, fit.x)
    assert torch.equal(other.averages.running_mean, network.averages.running_mean)
    assert as_it_serves(other, loaded) == as_it_serves(network, fit)


def test_a_run_that_stopped_ends_as_one_that_did_not(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(state: Any) -> None:
        if state.step >= 25:
            raise Stop

    whole, broken, fresh = Autoencoder(), Autoencoder(), Autoencoder()
    fit = fitted(whole)
    with pytest.raises(Stop):
        fitted(broken, out=tmp_path / "run", on_look=stop)
    loaded = bc.load(tmp_path / "run", model=fresh.model, guide=fresh.guide, args=(DATA,))
    assert 25 <= loaded.state.step < 40
    resumed = loaded.resume(progress=False)
    assert torch.equal(resumed.x, fit.x)
    assert torch.equal(fresh.averages.running_var, whole.averages.running_var)


def test_modules_that_are_left_alone_or_fitted_again() -> None:
    """The first fit is evaluated with its own, whatever the module has."""
    network, apart = Autoencoder(), Autoencoder()
    fit, without = fitted(network), fitted(apart, update_modules=False)
    served = as_it_serves(network, fit)
    assert int(apart.averages.num_batches_tracked) == 0
    assert as_it_serves(apart, without) == served
    fitted(network, DATA * 0.1)
    assert as_it_serves(network, fit) == served
    assert torch.equal(without.resume(20, progress=False).x, fit.resume(20, progress=False).x)


def test_spectral_norms_are_taken() -> None:
    """Every run turns their vectors a little: what two runs give is compared from the same start."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))

    def model(x: Tensor) -> None:
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(layer(z), 1.0).to_event(1), obs=x)

    program = bc.build(model, None, (DATA[:, :2],), family=bc.MeanField())
    assert any("spectral" in obstacle.lower() for obstacle in program.obstacles)
