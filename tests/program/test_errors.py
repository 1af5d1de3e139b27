"""Bad input: one sentence that names the site, argument or option and the way out."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.engine import Calculus, Stream
from bbvi_conv.families import MeanField
from bbvi_conv.objectives import ELBO
from bbvi_conv.program import Minibatch
from bbvi_conv.program.build import build

X = torch.tensor([0.3, -1.2, 2.0])


def model(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(a, b), obs=x)


def only_a(x: Tensor) -> None:
    pyro.sample("a", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def one_more(x: Tensor) -> None:
    only_a(x)
    pyro.sample("b", dist.LogNormal(0.0, 1.0))
    pyro.sample("c", dist.Normal(0.0, 1.0))


def outside(x: Tensor) -> None:
    only_a(x)
    pyro.sample("b", dist.Normal(-5.0, 0.1))


def wide(x: Tensor) -> None:
    pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("b", dist.LogNormal(0.0, 1.0))


@pytest.mark.parametrize(
    ("guide", "sentence"),
    [
        (only_a, r"the guide has no sample site 'b', a latent of the model; add it to the guide or observe it"),
        (one_more, r"guide site 'c' is no latent of the model; remove it, or mark it infer=\{\"is_auxiliary\": True\}"),
        (outside, r"a value of latent site 'b' lies outside the support"),
        (wide, r"latent site 'a' has shape \(\) in the model, but the guide draws shape \(2,\); check its plates"),
    ],
)
def test_bad_guides(guide, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build(model, guide, (X,))


def test_calls_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"the model takes \(x: .*\), and is given 2 positional: too many positional"):
        build(model, None, (X, X), family=MeanField())
    with pytest.raises(ValueError, match=r"the model takes .*given 0 positional, z=: .*mend args and kwargs"):
        build(model, None, (), {"z": X}, family=MeanField())
    with pytest.raises(ValueError, match=r"the guide takes \(\)"):
        build(model, lambda: None, (X,))
    with pytest.raises(
        ValueError, match=r"guide is the class AutoNormal: make one, guide=AutoNormal\(model\), or give"
    ):
        build(model, AutoNormal, (X,))


def test_observed_values_that_are_no_tensors() -> None:
    def model(x: list[float]) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"observed site 'x' has a value of type list: give a tensor") as caught:
        build(model, None, ([0.1, 0.2, 0.3],), family=MeanField())
    assert "Trace Shapes" not in str(caught.value)
    with pytest.raises(ValueError, match=r"observed site 'x' has a value of type ndarray"):
        build(model, None, (X.numpy(),), family=MeanField())


def test_nothing_to_fit() -> None:
    def observed(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x)

    for nothing in (observed, lambda x: None):
        with pytest.raises(ValueError, match="no latent site, and neither it nor the guide a parameter"):
            build(nothing, lambda x: None, (X,))


def test_a_discrete_latent_without_a_guide() -> None:
    def counted(x: Tensor) -> None:
        k = pyro.sample("k", dist.Poisson(0.3))
        pyro.sample("x", dist.Normal(k, 1.0).expand([3]).to_event(1), obs=x)

    def vector(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(torch.ones(3) / 2).to_event(1))
        pyro.sample("x", dist.Normal(k, 1.0).to_event(1), obs=x)

    for model in (counted, vector):
        for guide, family in ((None, MeanField()), (lambda x: None, None)):
            with pytest.raises(ValueError, match=r"^latent site 'k' is discrete, and its values cannot be listed: sum"):
                build(model, guide, (X,), family=family)


def test_sites_that_come_and_go() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 0:
            z = z + pyro.sample("more", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        if z > 0:
            pyro.sample("more", dist.Normal(0.0, 1.0))

    def gradients() -> None:
        for seed in range(20):  # until the run that measures the noise has the fewer sites
            program = build(model, guide, (X,), seed=seed)
            feed = Stream(program, 0, "optimise", 1).once(0, 20)
            Calculus(program, ELBO(), program.log_weights, 1.0).gradients(program.initial(), feed)

    with pytest.raises((RuntimeError, ValueError), match="sample sites, or their sizes, change from run to run"):
        gradients()


def test_a_draw_outside_the_support_is_told_as_such() -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(pyro.param("m", torch.tensor(1.5)), 1.0))

    program = build(model, guide, (X,))
    feed = Stream(program, 0, "optimise", 1).once(0, 40)
    says = {program.first_bad_site(program.initial(), feed.noise.at(i), program.batch(None)) for i in range(40)}
    assert any("the guide draws values of site 'b' outside its support" in one for one in says)


def test_guide_or_family() -> None:
    with pytest.raises(ValueError, match="a guide or a family is needed"):
        build(model, None, (X,))
    with pytest.raises(ValueError, match="either a guide or a family"):
        build(model, one_more, (X,), family=MeanField())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_named_with_the_first_index(bad: float) -> None:
    x = torch.zeros(3, 4)
    x[1, 2] = x[2, 0] = bad

    def rows(x: Tensor, y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(z + x, 1.0), obs=y.sum(-1))

    with pytest.raises(ValueError, match=rf"positional argument 1 holds {bad} at index \(1, 2\); remove such rows"):
        build(rows, None, (X, x), family=MeanField())


def filled(x: Tensor, y: Tensor) -> None:
    seen = ~torch.isnan(y)
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen):
        pyro.sample("y", dist.Normal(z * x, 1.0), obs=torch.where(seen, y, 0.0))


def masked(x: Tensor, y: Tensor) -> None:
    """The density is finite, its gradient is not."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    log_density = dist.Normal(z * x, 1.0, validate_args=False).log_prob(y)
    pyro.factor("y", torch.where(torch.isnan(y), 0.0, log_density).sum())


def gathered(x: Tensor, y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)


WHOLE = torch.linspace(0, 1, 6)
GAPS = torch.tensor([1.0, 2.0, float("nan"), 0.5, 1.0, float("nan")])


@pytest.mark.parametrize("batch", [None, Minibatch(2, plate="data")])
def test_data_with_gaps_are_taken_where_the_model_reads_past_them(batch: Minibatch | None) -> None:
    made = build(filled, None, (WHOLE, GAPS), family=MeanField(), minibatch=batch)
    x, (noise, seen) = made.initial(), made.example()
    assert made.site_values(x, noise, seen).log_p.isfinite()


@pytest.mark.parametrize(
    ("model", "args", "batch"),
    [
        (masked, (WHOLE, GAPS), None),
        (gathered, (WHOLE, GAPS), None),
        (gathered, (GAPS, WHOLE), None),
        (gathered, (GAPS, WHOLE), Minibatch(2, plate="data")),
    ],
)
def test_gaps_that_the_density_or_its_gradient_meets_are_named(
    model: Any, args: tuple[Tensor, ...], batch: Minibatch | None
) -> None:
    with pytest.raises(ValueError, match=r"argument [01] holds nan at index \(2,\); remove such rows, or mask"):
        build(model, None, args, family=MeanField(), minibatch=batch)


def partly(x: Tensor, y: Tensor) -> None:
    """Reads past gaps in the first column."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    seen = ~torch.isnan(y[:, 0])
    with pyro.plate("data", len(x)):
        with pyro.poutine.mask(mask=seen):
            pyro.sample("a", dist.Normal(z * x, 1.0), obs=torch.where(seen, y[:, 0], 0.0))
        pyro.sample("b", dist.Normal(z, 1.0), obs=y[:, 1])


def test_gaps_in_every_place_of_a_row_are_tried() -> None:
    y = torch.zeros(8, 2)
    y[2, 0] = y[3, 0] = float("nan")
    batch = Minibatch(2, plate="data")
    build(partly, None, (torch.ones(8), y), family=MeanField(), minibatch=batch)
    y[6, 1] = float("nan")
    with pytest.raises(ValueError, match=r"positional argument 1 holds nan at index \(2, 0\); remove such rows"):
        build(partly, None, (torch.ones(8), y), family=MeanField(), minibatch=batch)


def fails(x: Tensor, y: Tensor) -> None:
    index = x.long()
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(0.0, scale[index]), obs=torch.zeros(len(x)))


def test_an_error_that_gaps_may_have_caused_is_told_with_them() -> None:
    both = (
        r"positional argument 0 holds nan at index \(2,\) and positional argument 1 holds.*IndexError: .*out of bounds"
    )
    with pytest.raises(ValueError, match=both):
        build(fails, None, (GAPS, GAPS), family=MeanField())


def test_what_else_is_wrong_with_data_that_have_gaps_is_said() -> None:
    with pytest.raises(ValueError, match="no plate 'rows'"):
        build(filled, None, (torch.ones(6), GAPS), family=MeanField(), minibatch=Minibatch(2, plate="rows"))


def test_held_out_data_may_have_gaps_as_well() -> None:
    run: dict[str, Any] = {"minibatch": Minibatch(2, plate="data"), "max_steps": 1, "progress": False}
    assert bc.fit(filled, args=(WHOLE, WHOLE), held_out=(WHOLE, GAPS), **run).state.step == 1
    with pytest.raises(ValueError, match=r"argument 0 of held_out holds nan at index \(2,\)"):
        bc.fit(gathered, args=(WHOLE, WHOLE), held_out=(GAPS, WHOLE), **run)


def test_data_inside_the_model_are_checked_too() -> None:
    def closed() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([0.0, float("nan"), 1.0]))

    with pytest.raises(ValueError, match=r"observed site 'x' holds nan at index \(1,\)"):
        build(closed, None, (), family=MeanField())


def test_keyword_data_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"keyword argument 'x' holds nan at index \(0,\)"):
        build(model, None, (), {"x": torch.tensor([float("nan"), 0.0, 1.0])}, family=MeanField())


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"site 'x'.*shape"):
        build(model, None, (torch.zeros(5),), family=MeanField())

    def events(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"observed site 'x' expects event shape \(3,\), got a value of shape \(2,\)"):
        build(events, None, (torch.zeros(2),), family=MeanField())


def test_data_outside_the_support() -> None:
    def counts(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    with pytest.raises(ValueError, match=r"observed site 'x' lies outside the support.*check the data"):
        build(counts, None, (torch.tensor([1.0, -2.0, 3.0]),), family=MeanField())


def test_two_sites_of_one_name() -> None:
    def twice(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(RuntimeError, match=r"[Mm]ultiple.*'z'"):
        build(twice, None, (X,), family=MeanField())


def test_tensors_of_another_dtype() -> None:
    weights = torch.ones(3, 1)

    def regression(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        pyro.factor("f", -(a @ weights).square().sum())

    with pytest.raises(ValueError, match=r"does not run in float64 \(.*dtype.*keep their own dtype; cast them"):
        build(regression, None, (X,), family=MeanField(), dtype=torch.float64)
    assert build(regression, None, (X,), family=MeanField()).dtype is torch.float32  # no dtype asked for: one that runs


ENCODER = torch.nn.Linear(2, 4)
ROWS = torch.linspace(-1.0, 1.0, 40).reshape(20, 2)


def rows_in_plate(x: Tensor, *, likelihood: bool = True) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if likelihood:
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
    if not likelihood:
        pyro.sample("x", dist.Normal(z, 1.0).to_event(2), obs=x)


def encoded(x: Tensor, *, plate: bool = True) -> None:
    pyro.module("encoder", ENCODER)
    loc, scale = ENCODER(x).chunk(2, -1)
    with pyro.plate("data", len(x)) if plate else nullcontext():
        pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("model", "guide", "where"), [(False, True, "'x' of the model"), (True, False, "'z' of the guide")]
)
def test_rows_of_a_batch_outside_the_plate_would_not_be_scaled(model: bool, guide: bool, where: str, size: int) -> None:
    run, draw = functools.partial(rows_in_plate, likelihood=model), functools.partial(encoded, plate=guide)
    with pytest.raises(
        ValueError, match=f"site {where} holds the {size} rows of a batch and lies outside plate 'data'"
    ):
        build(run, draw, (ROWS,), minibatch=Minibatch(size, plate="data"))
    build(rows_in_plate, encoded, (ROWS,), minibatch=Minibatch(size, plate="data"))


def test_rows_that_a_model_looks_up_lie_in_the_plate_too() -> None:
    def looked_up(x: Tensor, *, plate: bool = True) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=4) as rows:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows, 0])
            if plate:
                pyro.sample("y", dist.Normal(loc, 1.0), obs=x[rows, 1])
        if not plate:
            pyro.sample("y", dist.Normal(loc, 1.0).expand([4]).to_event(1), obs=x[rows, 1])

    batch = Minibatch(4, plate="data")
    build(looked_up, None, (ROWS,), family=MeanField(), minibatch=batch)
    with pytest.raises(ValueError, match="site 'y' of the model holds the 4 rows of a batch"):
        build(functools.partial(looked_up, plate=False), None, (ROWS,), family=MeanField(), minibatch=batch)


def test_rows_outside_the_plate_may_be_scaled_by_hand_and_batches_of_one_size() -> None:
    def by_hand(x: Tensor) -> None:
        assert len(x) == 4
        loc = pyro.sample("loc", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[:, 0])
        with poutine.scale(scale=5.0):
            pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=x[:, 1])

    program = build(by_hand, None, (ROWS,), family=MeanField(), minibatch=Minibatch(4, plate="data"))
    assert [site.name for site in program.structure.observed] == ["x", "y"]
    assert program.scale == 5.0


def test_dimensions_beside_a_plate_are_nobodys() -> None:
    def beside(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("y", dist.Normal(loc + z, 1.0), obs=y)

    program = build(beside, None, (torch.ones(5, 3),), family=MeanField())
    assert [site.size for site in program.structure.latents] == [1, 15]


def test_a_vector_that_happens_to_be_as_long_as_a_batch_is_no_batch() -> None:
    def wide(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x @ weights[:2, None], 1.0).to_event(1), obs=x[:, :1])

    program = build(wide, None, (ROWS,), family=MeanField(), minibatch=Minibatch(4, plate="data"))
    assert [(site.name, site.size, site.plates) for site in program.structure.latents] == [("weights", 4, ())]
    assert program.scale == 5.0


@pytest.mark.parametrize("plate", [True, False])
def test_a_column_against_a_vector_is_no_square(plate: bool) -> None:
    def counts(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 3) if plate else nullcontext():
            pyro.sample("y", dist.Poisson(rate), obs=y)

    y = torch.tensor([3.0, 1.0, 2.0])
    build(counts, None, (y,), family=MeanField())
    with pytest.raises(ValueError, match=r"observed site 'y' has densities of shape \(3, 3\).*squeeze\(-1\)"):
        build(counts, None, (y[:, None],), family=MeanField())


def test_data_that_no_density_takes_are_named() -> None:
    with pytest.raises(ValueError, match=r"positional argument 0 is a sparse tensor.*to_dense\(\)"):
        build(model, None, (X.to_sparse(),), family=MeanField())

    def of_rows(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ValueError, match="the data have no rows"):
        build(of_rows, None, (X[:0],), family=MeanField())


@pytest.mark.filterwarnings("ignore:Singular sample")
def test_a_support_without_a_transform_is_named() -> None:
    def of_a_matrix(x: Tensor) -> None:
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(5.0), torch.eye(3)))
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), precision_matrix=precision), obs=x)

    for family in (MeanField(), bc.FullRank()):
        with pytest.raises(ValueError, match=r"latent site 'precision' has support PositiveDefinite.*LKJCholesky"):
            build(of_a_matrix, None, (X,), family=family)


def test_networks_that_nobody_registered_leave_nothing_to_fit() -> None:
    def draws(x: Tensor) -> None:
        pyro.sample("a", dist.Normal(0.3, 1.0))
        pyro.sample("b", dist.LogNormal(0.0, 1.0))

    build(model, draws, (X,))  # which can be evaluated
    with pytest.raises(ValueError, match=r"neither the model nor the guide has a parameter.*pyro\.module"):
        bc.fit(model, draws, args=(X,), progress=False)
