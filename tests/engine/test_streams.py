"""Noise and rows of a step: the same numbers wherever a chunk begins, and whoever else is looked at."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bbvi_conv.engine import Stream
from bbvi_conv.engine.streams import FEW, LONGEST, NUMBERS, block_of
from bbvi_conv.families import MeanField
from bbvi_conv.program import Minibatch, Program
from bbvi_conv.program.build import build
from bbvi_conv.program.noise import BLOCK


def program(latents: int = 3) -> Program:
    """So many standard normals a draw, rows in minibatches."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z[0], 1.0), obs=x)

    return build(model, None, (torch.arange(30.0),), family=MeanField(), minibatch=Minibatch(4, plate="data"))


def joined(stream: Stream, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Normals and rows of consecutive steps."""
    feeds = list(stream.steps(start, count))
    rows = [feed.rows for feed in feeds if feed.rows is not None]
    return torch.cat([feed.noise.normal for feed in feeds]), torch.cat(rows)


@pytest.mark.parametrize(
    ("latents", "block"),
    [(1, LONGEST), (FEW // BLOCK // 2, 2 * BLOCK), (FEW // BLOCK, BLOCK), (NUMBERS // BLOCK + 1, BLOCK // 2)],
)
def test_blocks_are_long_where_steps_take_few_numbers(latents: int, block: int) -> None:
    made = program(latents)
    assert block_of(made, 1) == block
    assert block_of(made, 2 * NUMBERS) == 1


def test_a_step_sees_the_same_wherever_a_chunk_begins() -> None:
    made = program()
    stream = Stream(made, 3, "optimise", 2)
    assert stream.block == LONGEST
    normals, rows = joined(stream, 0, LONGEST + 300)
    assert len(normals.unique(dim=0)) == LONGEST + 300
    assert len(rows.unique(dim=0)) > LONGEST  # 30 ** 4 of them are equally likely
    for start, count in ((0, 1), (BLOCK - 1, 2), (LONGEST - 10, 250), (LONGEST, 1)):
        again = joined(Stream(made, 3, "optimise", 2), start, count)
        assert torch.equal(again[0], normals[start : start + count])
        assert torch.equal(again[1], rows[start : start + count])


def test_seeds_see_what_they_would_alone() -> None:
    made = program()
    stream = Stream(made, 5, "optimise", 1, num_seeds=4)
    normals, rows = joined(stream, 2000, 100)
    for seed in range(4):
        for own in (Stream(made, 5 + seed, "optimise", 1), stream.of_seeds(seed)):
            found = joined(own, 2000, 100)
            assert torch.equal(found[0], normals[:, seed])
            assert torch.equal(found[1], rows[:, seed])
    pair = stream.of_seeds(slice(2, 4))
    assert pair is stream.of_seeds(slice(2, 4))
    found = joined(pair, 2000, 100)
    assert torch.equal(found[0], normals[:, 2:])
    assert torch.equal(found[1], rows[:, 2:])
