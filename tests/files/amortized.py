"""A VAE in a model file, for tests of what is made anew, saved and taken up again."""

import pyro
import pyro.distributions as dist
import torch

encoder, decoder = torch.nn.Linear(4, 4), torch.nn.Linear(2, 4)


def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)


def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        loc, log_scale = encoder(x).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def data():
    return (torch.randn(200, 4, generator=torch.Generator().manual_seed(0)),)
