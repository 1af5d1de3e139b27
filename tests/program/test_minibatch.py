"""Minibatches: how the model sees rows, the scale N/B, and the laws of the two samplings."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from bbvi_conv.engine import Calculus
from bbvi_conv.engine.streams import Feed, Stream
from bbvi_conv.families import FullRank, MeanField
from bbvi_conv.objectives import ELBO
from bbvi_conv.program import Minibatch, Noise, Program
from bbvi_conv.program.build import build
from bbvi_conv.program.noise import BLOCK
from bbvi_conv.program.trace import TracedLogWeights

N, B = 4, 2
X = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
C = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)


def gathered(x: Tensor, c: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    free = pyro.param("free", torch.tensor(0.4))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, c), obs=x)
        pyro.sample("c", dist.LogNormal(free, 1.0), obs=c)  # depends on no latent


def indexed(x: Tensor, c: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    free = pyro.param("free", torch.tensor(0.4))
    with pyro.plate("data", N, subsample_size=B) as rows:
        pyro.sample("x", dist.Normal(z, c[rows]), obs=x[rows])
        pyro.sample("c", dist.LogNormal(free, 1.0), obs=c[rows])


def loaded(x: Tensor, c: Tensor) -> None:
    """As for batches of a loader, which Pyro has to be told the size of the whole of."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    free = pyro.param("free", torch.tensor(0.4))
    with pyro.plate("data", N, len(x)):
        pyro.sample("x", dist.Normal(z, c), obs=x)
        pyro.sample("c", dist.LogNormal(free, 1.0), obs=c)


def loaded_rows(x: Tensor, c: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    free = pyro.param("free", torch.tensor(0.4))
    with pyro.plate("data", N, subsample=x) as row:
        pyro.sample("x", dist.Normal(z, c), obs=row)
        pyro.sample("c", dist.LogNormal(free, 1.0), obs=c)


def local_gathered(x: Tensor, c: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, c), obs=x)


def amortized(x: Tensor, c: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 0.7))


def over_all_batches(program: Program, x: Tensor, noise: Noise, *, traced: bool) -> tuple[Tensor, Tensor]:
    """Loss and gradient averaged over all N^B equally likely batches, at one and the same noise."""
    rows = torch.tensor(list(itertools.product(range(N), repeat=B)))
    same = Noise(*(part.expand(len(rows), 1, -1) for part in noise))
    calculus = Calculus(program, ELBO(), TracedLogWeights(program) if traced else program.log_weights, 1.0)
    grads, losses = calculus.gradients(x, Feed(same, rows))
    assert losses.std() > 0.1  # power: the batches differ
    return losses.mean(), grads.mean(0)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("family", [MeanField(), FullRank()], ids=["mean-field", "full-rank"])
@pytest.mark.parametrize("model", [gathered, indexed, loaded, loaded_rows], ids=lambda model: model.__name__)
def test_mean_over_all_minibatches_is_the_whole_bound(model, family, traced: bool, moved, draw) -> None:
    program = build(model, None, (X, C), family=family, minibatch=Minibatch(B, plate="data"), dtype=torch.float64)
    assert program.by_index == (model is indexed)
    assert (program.scale, program.unit_scale, program.total) == (2.0, 1.0, N)
    full = build(gathered, None, (X, C), family=family, dtype=torch.float64)
    x, noise = moved(program), draw(program, 1)
    grads, losses = Calculus(full, ELBO(), full.log_weights, 1.0).gradients(x, Feed(draw(full, 1, 1)))
    loss, grad = over_all_batches(program, x, noise, traced=traced)
    torch.testing.assert_close(loss, losses[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, grads[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model", [indexed, loaded, loaded_rows], ids=lambda model: model.__name__)
def test_plates_of_the_whole_agree_with_pyro(model, agrees_with_pyro) -> None:
    program = build(model, None, (X, C), family=MeanField(), minibatch=Minibatch(B, plate="data"), dtype=torch.float64)
    assert program.by_index == (model is indexed)
    assert program.scale == 2.0
    agrees_with_pyro(program)  # Pyro scales by N/B itself


def test_local_latents_of_an_amortized_guide_agree_with_pyro(agrees_with_pyro) -> None:
    program = build(local_gathered, amortized, (X, C), minibatch=Minibatch(B, plate="data"), dtype=torch.float64)
    assert program.structure.unit == ("data",)
    assert program.unit_scale == 2.0
    agrees_with_pyro(program, scale=2.0)


def test_local_latents_in_a_plate_of_the_whole_agree_with_pyro(agrees_with_pyro) -> None:
    def model(x: Tensor, c: Tensor) -> None:
        with pyro.plate("data", N, len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, c), obs=x)

    def guide(x: Tensor, c: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", N, len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.7))

    program = build(model, guide, (X, C), minibatch=Minibatch(B, plate="data"), dtype=torch.float64)
    assert (program.structure.unit, program.unit_scale) == (("data",), 2.0)
    agrees_with_pyro(program)


def test_a_fault_of_a_model_is_told_whatever_its_plate() -> None:
    def model(x: Tensor, c: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=c[:, :, None])

    with pytest.raises(IndexError, match="too many indices"):
        build(model, None, (X, C), family=MeanField(), minibatch=Minibatch(B, plate="data"))


def test_mean_field_with_parameters_per_row(agrees_with_pyro, moved, draw) -> None:
    def model(x: Tensor, c: Tensor) -> None:
        with pyro.plate("data", N, subsample_size=B) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, c[rows]), obs=x[rows])

    program = build(model, None, (X, C), family=MeanField(), minibatch=Minibatch(B, plate="data"), dtype=torch.float64)
    assert program.structure.unit == ("data",)
    assert [leaf.tensor.shape for leaf in program.leaves] == [(N,), (N,)]
    agrees_with_pyro(program)
    x, noise = moved(program), draw(program, 1, 1)
    calculus = Calculus(program, ELBO(), TracedLogWeights(program), 1.0)
    grads, _ = calculus.gradients(x, Feed(noise, torch.tensor([[1, 3]])))
    assert (grads[0].reshape(2, N)[:, [0, 2]] == 0).all()
    assert (grads[0].reshape(2, N)[:, [1, 3]] != 0).all()


def test_every_row_tensor_is_gathered_and_nothing_else() -> None:
    def model(x: Tensor, table: Tensor, c: Tensor) -> None:
        assert table.shape == (3,)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z + table.sum(), c), obs=x)

    args = (X, torch.ones(3, dtype=torch.float64), C)
    program = build(model, None, args, family=MeanField(), minibatch=Minibatch(B, plate="data"), dtype=torch.float64)
    assert program.batched == (0, 2)
    batch = program.batch(torch.tensor([3, 0]))
    assert torch.equal(batch.args[0], X[[3, 0]])
    assert torch.equal(batch.args[1], C[[3, 0]])


def test_rows_that_are_not_there_are_never_looked_up() -> None:
    """A GPU that meets such an index is of no more use to the process: finding out how a model subsamples must not."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=B) as rows:
            assert int(rows.max()) < len(x)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    assert build(model, None, (X,), family=MeanField(), minibatch=Minibatch(B, plate="data")).by_index


def test_other_uses_of_the_plate_get_one_sentence() -> None:
    def fixed(x: Tensor, c: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N):
            pyro.sample("x", dist.Normal(z, 1.0).expand([N]), obs=X)

    with pytest.raises(
        ValueError, match=r"plate 'data' has size 4 .*; write plate\(\"data\", len\(x\)\).*subsample_size=2"
    ):
        build(fixed, None, (X, C), family=MeanField(), minibatch=Minibatch(B, plate="data"))
    with pytest.raises(ValueError, match=r"plate 'data' subsamples 2 of 4 rows; pass minibatch=Minibatch\(2, plate"):
        build(indexed, None, (X, C), family=MeanField())
    with pytest.raises(ValueError, match=r"no plate 'rows' to subsample; its plates are \['data'\]"):
        build(gathered, None, (X, C), family=MeanField(), minibatch=Minibatch(B, plate="rows"))
    with pytest.raises(ValueError, match="minibatch size 5 exceeds the 4 rows"):
        build(gathered, None, (X, C), family=MeanField(), minibatch=Minibatch(5, plate="data"))
    with pytest.raises(ValueError, match="needs a tensor among the positional arguments"):
        build(lambda: None, None, (), family=MeanField(), minibatch=Minibatch(5, plate="data"))
    with pytest.raises(ValueError, match=r"latent site 'z' lies in the subsampled plate.*amortized guide"):
        build(local_gathered, None, (X, C), family=MeanField(), minibatch=Minibatch(B, plate="data"))


def test_bad_minibatches() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Minibatch(0, plate="data")
    with pytest.raises(ValueError, match='"iid" or "epoch", got \'shuffle\''):
        Minibatch(2, plate="data", sampling="shuffle")


def rows_of(sampling: str, total: int, size: int, start: int, count: int, seed: int = 3) -> Tensor:
    """Rows of consecutive steps."""
    return Minibatch(size, plate="data", sampling=sampling).indices(seed, start, count, total, BLOCK)


def test_iid_rows_are_uniform_and_independent() -> None:
    rows = rows_of("iid", 10, 4, 0, 3000)
    assert rows.shape == (3000, 4)
    assert stats.chisquare(torch.bincount(rows.reshape(-1), minlength=10).numpy()).pvalue > 1e-4
    pairs = torch.bincount(rows[:, 0] * 10 + rows[:, 1], minlength=100)  # with replacement: all 100 pairs alike
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-4
    steps = torch.bincount(rows[:-1, 0] * 10 + rows[1:, 0], minlength=100)
    assert stats.chisquare(steps.numpy()).pvalue > 1e-4


def test_epochs_are_permutations() -> None:
    rows = rows_of("epoch", 10, 3, 0, 3 * 400).reshape(400, 9)
    assert all(len(set(epoch.tolist())) == 9 for epoch in rows)
    counts = torch.bincount(rows.reshape(-1), minlength=10)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4  # the row left out changes from epoch to epoch
    assert len({tuple(epoch.tolist()) for epoch in rows}) == 400


@pytest.mark.parametrize("sampling", ["iid", "epoch"])
def test_rows_of_a_step_do_not_depend_on_where_one_starts(sampling: str) -> None:
    rows = rows_of(sampling, 10, 3, 0, 600)
    for start, count in ((1, 5), (250, 20), (511, 2)):
        assert torch.equal(rows_of(sampling, 10, 3, start, count), rows[start : start + count])
    assert not torch.equal(rows_of(sampling, 10, 3, 0, 20, seed=4), rows[:20])


def test_the_monitor_draws_rows_of_its_own() -> None:
    program = build(
        gathered,
        None,
        (X, C),
        family=MeanField(),
        minibatch=Minibatch(B, plate="data", sampling="epoch"),
        dtype=torch.float64,
    )
    feed = Stream(program, 0, "monitor", 1).once(0, 4000)
    assert feed.rows.shape == (4000, B)
    same = float((feed.rows[:, 0] == feed.rows[:, 1]).double().mean())
    assert abs(same - 1 / N) < 4 * (0.25 * 0.75 / 4000) ** 0.5  # i.i.d. from the whole data, whatever the steps do
    again = Stream(program, 0, "monitor", 1).once(0, 4000)
    assert torch.equal(again.rows, feed.rows)
    assert not torch.equal(Stream(program, 0, "evaluate", 1).once(0, 4000).rows, feed.rows)
    assert not torch.equal(Stream(program, 0, "monitor", 1).once(1, 4000).rows, feed.rows)


def test_held_out_rows(draw) -> None:
    program = build(
        gathered, None, (X, C), family=MeanField(), minibatch=Minibatch(B, plate="data"), dtype=torch.float64
    )
    other = program.with_data((torch.tensor([5.0, 6.0, 7.0]), torch.ones(3)))
    assert other.total == 3
    assert torch.equal(other.batch(torch.tensor([2, 0])).args[0], torch.tensor([7.0, 5.0], dtype=torch.float64))
    full = build(gathered, None, (X, C), family=MeanField())
    with pytest.raises(ValueError, match="held-out data needs a minibatch"):
        full.with_data((X, C))
