"""Loops written by hand pose our problem, and train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bbvi_conv as bc
from bbvi_conv.engine import Calculus
from bbvi_conv.engine.streams import Feed


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout is on the path for these tests, and images are simulated."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    monkeypatch.delenv("BBVI_CONV_DATA", raising=False)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_the_loss_written_by_hand_is_ours_at_the_same_draw(name: str) -> None:
    from benchmarks.cases.vae import conv, conv_vae, mlp, vae

    problem = {"mlp": mlp, "conv": conv}[name](batch=4, rows=9)
    case = {"mlp": vae, "conv": conv_vae}[name](batch=4, rows=9)
    program = case.program()
    noise = program.layout.draw(torch.Generator().manual_seed(0), 1, 1, dtype=torch.float32)
    rows = torch.tensor([[3, 8, 0, 3]])
    (ours,) = Calculus(program, bc.ELBO(1), program.log_weights, 1.0).losses(program.initial(), Feed(noise, rows))
    by_hand = problem.loss(
        problem.encoder, problem.decoder, problem.images[rows[0]], noise.normal.reshape(4, problem.latent)
    )
    assert float(by_hand.detach()) == pytest.approx(float(ours) / 9, rel=4e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # what torch says to itself
@pytest.mark.parametrize("name", ["torch_loop", "torch_loop_fused_adam", "torch_compile_loop", "pythae_trainer"])
def test_every_loop_trains_a_copy_of_the_networks(name: str) -> None:
    if name == "pythae_trainer":
        pytest.importorskip("pythae", reason="pythae is not installed: make benchmark-deps installs it")
    from benchmarks.cases.vae import mlp
    from benchmarks.loops import contenders

    problem = mlp(hidden=16, latent=2, batch=32, rows=200)
    before = [p.clone() for p in (*problem.encoder.parameters(), *problem.decoder.parameters())]
    turn = contenders(problem)[name]()
    assert turn(1) > 0
    (first,) = turn.losses
    turn(150)
    turn(5)
    assert sum(turn.losses) / len(turn.losses) < 0.75 * first  # from log 2 a pixel towards the entropy of a coin flip
    after = [*problem.encoder.parameters(), *problem.decoder.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
