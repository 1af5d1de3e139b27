"""Models as Pyro's users write them in scripts: tensors and networks of their own, registered where it suits them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from bbvi_conv.engine import Calculus
from bbvi_conv.engine.streams import Stream
from bbvi_conv.families import FullRank, MeanField, Structured
from bbvi_conv.families.scale_maps import Linear
from bbvi_conv.objectives import ELBO
from bbvi_conv.program import Program
from bbvi_conv.program.build import build
from bbvi_conv.program.device import moved
from bbvi_conv.program.minibatch import Minibatch
from bbvi_conv.program.trace import TracedLogWeights

Y = torch.tensor([1.0, 0.0, 1.0, 1.0])
START, PRIOR, EYE = torch.tensor([2.0, 3.0]), torch.tensor(0.5), torch.eye(3)


def coin(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("d", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def started(y: Tensor) -> None:
    a = pyro.param("a", START, constraint=constraints.positive)
    pyro.sample("p", dist.Beta(a[0], a[1]))


def with_prior(y: Tensor) -> None:
    z = pyro.sample("z", dist.Gamma(PRIOR, PRIOR).expand([3]).to_event(1))
    with pyro.plate("d", len(y)):
        pyro.sample("y", dist.Poisson(z.sum()), obs=y)


class Sampled(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, y: Tensor) -> None:
        loc = self.loc
        with pyro.plate("d", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def product(y: Tensor) -> None:
    p = pyro.param("p", lambda: torch.ones(3))
    with pyro.plate("d", len(y)):
        pyro.sample("y", dist.Normal((EYE @ p).sum(), 1.0), obs=y)


def nothing(y: Tensor) -> None:
    pass


def used_before() -> AutoNormal:
    guide = AutoNormal(coin)
    guide(Y)
    return guide


@pytest.mark.parametrize(
    ("model", "guide", "dtype"),
    [
        (coin, lambda: started, torch.float64),
        (coin, used_before, torch.float64),
        (with_prior, lambda: None, torch.float64),
        (Sampled(), lambda: None, torch.float64),
        (product, lambda: nothing, torch.float32),  # which no product takes in two types
    ],
    ids=["parameter", "guide", "prior", "PyroSample", "constant"],
)
def test_tensors_of_single_precision_made_outside(
    model: Any, guide: Callable[[], Any], dtype: torch.dtype, excess: Callable[[Program], float]
) -> None:
    made = guide()
    program = build(model, made, (Y,), family=None if made else MeanField())
    assert program.dtype is dtype
    assert excess(program) <= 1.0


@pytest.fixture
def excess() -> Callable[[Program], float]:
    """Largest error of a loss or gradient of the traced program, beside its run by Pyro's handlers, over the tolerance.

    That is a + a |expected| with a = 1e-9 for float64 and 1e-4 for float32; infinite where there is no gradient to get
    wrong.
    """

    def check(program: Program) -> float:
        feed, x = Stream(program, 0, "test", 1).once(0, 3), program.initial()
        ours, right = (Calculus(program, ELBO(1), w, 1.0) for w in (TracedLogWeights(program), program.log_weights))
        (grads, losses), (expected, bounds) = ours.gradients(x, feed), right.gradients(x, feed)
        tolerance = 1e-9 if program.dtype is torch.float64 else 1e-4
        if not bool((expected != 0).any()):
            return math.inf
        errors = [(a - b).abs() / (tolerance + tolerance * b.abs()) for a, b in ((losses, bounds), (grads, expected))]
        return float(torch.cat([error.reshape(-1) for error in errors]).max())  # of torch, which keeps NaN

    return check


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def registered(self, x: Tensor) -> None:
        pyro.module("vae", self)
        self.guide(x)


@pytest.mark.parametrize("where", ["model", "both", "guide"])
def test_a_network_counts_where_it_is_used_wherever_it_is_registered(where: str, excess: Any) -> None:
    vae, x = Autoencoder().double(), torch.randn(6, 4, dtype=torch.float64)

    def unregistered(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(vae.decoder(z), 1.0).to_event(1), obs=x)

    model = unregistered if where == "guide" else vae.model
    guide = vae.guide if where == "model" else vae.registered
    program = build(model, guide, (x,), dtype=torch.float64)
    groups = {leaf.name.split("$$$")[1].split(".")[0]: leaf.group for leaf in program.leaves}
    assert groups == {"encoder": "phi", "decoder": "theta"}
    assert excess(program) <= 1.0


def test_what_only_the_density_of_the_guide_uses_is_the_guides() -> None:
    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, y: Tensor) -> None:
            pyro.module("guide", self)
            with pyro.poutine.block():
                eps = pyro.sample("eps", dist.Normal(0.0, 1.0))
            pyro.sample("p", dist.Delta(eps.sigmoid(), log_density=-self.log_scale * eps**2))

    program = build(coin, Guide(), (Y,))
    assert [(leaf.name, leaf.group) for leaf in program.leaves] == [("guide$$$log_scale", "phi")]
    assert all(leaf.group == "phi" for leaf in build(coin, None, (Y,), family=MeanField(0.3, Linear())).leaves)


@pytest.mark.parametrize("operation", ["__ior__", "__iand__", "__ixor__"])
def test_masks_are_changed_in_place(operation: str, excess: Callable[[Program], float]) -> None:
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        seen = torch.tensor([True, True, False, False])
        seen = getattr(seen, operation)(y.bool())
        with pyro.plate("d", len(y)), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    assert excess(build(model, None, (Y,), family=MeanField())) <= 1.0


@pytest.mark.parametrize(
    ("kind", "sizes", "options"),
    [
        (nn.RNN, (2, 3), {"nonlinearity": "relu"}),
        (nn.GRU, (2, 3), {}),
        (nn.LSTM, (2, 3), {}),
        (nn.TransformerEncoderLayer, (2, 1, 4), {"dropout": 0.0}),
    ],
)
def test_recurrent_layers_and_attention_without_dropout_are_no_noise(
    kind: Any, sizes: tuple[int, ...], options: dict[str, Any], excess: Callable[[Program], float]
) -> None:
    network = kind(*sizes, batch_first=True, **options)

    def model(x: Tensor) -> None:
        pyro.module("network", network)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        made = network(x)
        made = made[0] if isinstance(made, tuple) else made
        with pyro.plate("d", len(x)):
            pyro.sample("y", dist.Normal(z + (made * made).sum((-1, -2)), 1.0), obs=x[:, 0, 0])

    program = build(model, None, (torch.randn(6, 5, 2),), family=MeanField(), dtype=torch.float32)
    assert excess(program) <= 1.0
    feed, x = Stream(program, 0, "test", 1).once(0, 2), program.initial()
    calculus = Calculus(program, ELBO(1), TracedLogWeights(program), 1.0)
    products = calculus.hessian_products(x, torch.eye(len(x))[:2], feed)
    assert bool(products.isfinite().all())


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells_change_what_they_made_in_place(kind: Any, excess: Callable[[Program], float]) -> None:
    cell = kind(2, 3).double()

    def model(x: Tensor) -> None:
        pyro.module("cell", cell)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        state: Any = None
        for t in range(5):
            state = cell(x[:, t], state)
        last = state[0] if isinstance(state, tuple) else state
        with pyro.plate("d", len(x)):
            pyro.sample("y", dist.Normal(z + (last * last).sum(-1), 1.0), obs=x[:, 0, 0])

    program = build(model, None, (torch.randn(6, 5, 2, dtype=torch.float64),), family=MeanField())
    assert excess(program) <= 1.0


def test_dropout_between_recurrent_layers_is_noise() -> None:
    network = nn.GRU(2, 3, num_layers=2, dropout=0.5)

    def model(x: Tensor) -> None:
        pyro.module("network", network)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + network(x)[0].sum(), 1.0), obs=x.sum())

    program = build(model, None, (torch.randn(5, 6, 2),), family=MeanField(), dtype=torch.float32)
    assert list(program.obstacles) == ["random operation 'gru' is not on the noise tape"]


def rows_of_its_own(y: Tensor) -> None:
    probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("c", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("d", len(y), 2) as rows:
        z = pyro.sample("z", dist.Categorical(probs))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y[rows])


def all_rows(y: Tensor) -> None:
    with pyro.plate("d", 4) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def some_rows(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.zeros(4))
    with pyro.plate("d", 4, 2) as rows:
        pyro.sample("z", dist.Normal(loc[rows], 1.0))


@pytest.mark.parametrize(("model", "guide"), [(rows_of_its_own, None), (all_rows, some_rows)])
def test_a_plate_that_subsamples_by_itself_is_named(model: Any, guide: Any) -> None:
    with pytest.raises(ValueError, match=r'plate .d. subsamples 2 of 4 rows; pass minibatch=Minibatch\(2, plate="d"\)'):
        build(model, guide, (Y,), family=None if guide else MeanField())


def test_a_plate_without_a_size() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("d"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("d"):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)) * y, 1.0))

    assert build(model, guide, (Y,)).structure.describe() == "one unit per index of plate d"
    with pytest.raises(ValueError, match=r"plate 'd' has no size: write pyro.plate\(\"d\", len\(x\)\)"):
        build(model, guide, (Y,), minibatch=Minibatch(2, plate="d"))
    for family in (MeanField(), FullRank(), Structured()):
        with pytest.raises(ValueError, match=r"plate 'd' of site 'z' has no size: .* or give a guide"):
            build(model, None, (Y,), family=family)


def test_what_pyro_adds_to_errors_is_left_out() -> None:
    def model(y: Tensor) -> None:
        pyro.sample("a_site_with_a_long_name", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(torch.tensor(-1.0).log(), 1.0))

    with pytest.raises(ValueError, match="Expected parameter loc") as caught:
        build(model, None, (Y,), family=MeanField())
    assert "Trace Shapes" not in str(caught.value)


PRIORS = {
    "normal": lambda: dist.Normal(0.0, 1.0).expand([2]).to_event(1),
    "log-normal": lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1),
    "gumbel": lambda: dist.Gumbel(torch.zeros(2), 1.0).to_event(1),
    "moved": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0), [dist.transforms.AffineTransform(torch.ones(2), 2.0)]
    ).to_event(1),
}


@pytest.mark.parametrize("name", PRIORS)
def test_priors_of_a_module_go_with_it(name: str) -> None:
    """Where nothing lies elsewhere they are left alone; on a device without numbers they can be told to be there."""

    class Net(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = PyroSample(PRIORS[name]())

        def forward(self, y: Tensor) -> None:
            pyro.sample("y", dist.Normal(self.weight.sum(), 1.0), obs=y)

    net = Net()
    prior = net._pyro_samples["weight"]
    for _ in range(2):  # what a transform remembers of the first time
        build(net, None, (torch.tensor(1.0),), family=MeanField())
        prior.log_prob(prior.sample())
        assert net._pyro_samples["weight"] is prior
    away = moved(prior, torch.device("meta"))
    assert away.sample().device.type == "meta"
    assert prior.sample().device.type == "cpu"


@pytest.mark.parametrize("rows", [False, True])
def test_networks_of_double_precision_are_taken_as_they_are(rows: bool) -> None:
    network = nn.Linear(2, 1).double()

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("network", network)
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(network(x).squeeze(-1), scale), obs=y)

    batch = Minibatch(3, plate="data") if rows else None
    made = build(model, None, (torch.ones(9, 2), torch.ones(9)), family=MeanField(), minibatch=batch)
    assert made.dtype is torch.float64


def test_what_is_said_is_of_single_precision_where_neither_runs() -> None:
    """A network of it, and places that are no whole numbers: the other type is tried, and fails for another reason."""
    network = nn.Linear(2, 3)

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("network", network)
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(network(x).gather(1, y.unsqueeze(1)).squeeze(1), scale), obs=y)

    with pytest.raises(ValueError, match=r"does not run in float32 \(gather\(\)"):
        build(model, None, (torch.ones(9, 2), torch.ones(9)), family=MeanField(), minibatch=Minibatch(3, plate="data"))
