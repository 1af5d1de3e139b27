"""Shipped models, loaded by path as the command line does, and what several rooms of the house test against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn

from bbvi_conv.model_file import load_module
from bbvi_conv.program import Batch, Noise, Program
from bbvi_conv.program.trace import TracedLogWeights


def pytest_runtest_setup() -> None:
    """Every test draws the same random numbers and finds Pyro's store empty, whatever ran before it."""
    torch.manual_seed(0)
    pyro.clear_param_store()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled code of the tests goes to a folder of theirs, and ``engine="auto"`` runs traced, with no compiling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BBVI_CONV_CACHE", str(tmp_path_factory.mktemp("cache") / "own"))
        patch.setattr("bbvi_conv.engine.choose.COMPILE_SECONDS", float("inf"))
        yield


@pytest.fixture(scope="session")
def shipped() -> Callable[[str], ModuleType]:
    """``shipped("eight_schools")``: that model file as a module."""
    return cache(load_module)


@pytest.fixture(scope="session")
def draw() -> Callable[..., Noise]:
    """``draw(program, *leading, seed=0)``: base noise from a fixed seed."""

    def make(program: Program, *leading: int, seed: int = 0) -> Noise:
        return program.layout.draw(torch.Generator().manual_seed(seed), *leading, dtype=program.dtype)

    return make


@pytest.fixture(scope="session")
def moved() -> Callable[..., Tensor]:
    """``moved(program)``: parameters some way off the start, where no gradient vanishes by symmetry."""

    def make(program: Program, by: float = 0.1, seed: int = 1) -> Tensor:
        x = program.initial()
        return x + by * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)

    return make


@pytest.fixture(scope="module")
def traced(program: Program) -> TracedLogWeights:
    """The graphs of the module's ``program``."""
    return TracedLogWeights(program)


@pytest.fixture(scope="session")
def coder() -> Callable[..., tuple[Callable[[Tensor], None], Callable[[Tensor], None]]]:
    """``coder(encoder, decoder, latents=2)``: model and guide of a VAE whose data are normal around the decoder."""

    def make(
        encoder: nn.Module, decoder: nn.Module, latents: int = 2
    ) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
        def model(x: Tensor) -> None:
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([latents]).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                loc, log_scale = encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        return model, guide

    return make


@pytest.fixture(scope="session")
def pyro_gradient() -> Callable[..., tuple[Tensor, Tensor]]:
    """``pyro_gradient(program, x, noise, batch)``: loss and flat gradient by Pyro's own ``Trace_ELBO`` at that noise.

    By its ``TraceEnum_ELBO`` where the program sums discrete latents out. Pyro runs in the same handlers, so its draws
    come from the same slices of noise; its parameters are the leaves.
    """

    def compute(program: Program, x: Tensor, noise: Noise, batch: Batch) -> tuple[Tensor, Tensor]:
        program.write_back(x)
        with program.handlers(noise, batch):
            args = program.positional(batch)
            bound, model = Trace_ELBO(), program.model
            if program.enumerated is not None:
                bound = TraceEnum_ELBO(max_plate_nesting=-1 - program.enumerated.dim)
                model = program.enumerated.marked(model)
            loss = bound.differentiable_loss(model, program.guide, *args, **program.kwargs)
            leaves = [leaf.tensor for leaf in program.leaves]
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        pairs = zip(grads, leaves, strict=True)
        flat = [(torch.zeros_like(leaf) if grad is None else grad).reshape(-1) for grad, leaf in pairs]
        return loss.detach(), torch.cat(flat)

    return compute
