"""Declared constants bound what is measured, and are met where they are said to be exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from bbvi_conv.networks import BoundedLinear, SoftClipping, bounded_mlp, constants
from bbvi_conv.networks.constants import ACTIVATIONS, kinks, operator_norm
from bbvi_conv.networks.encoders import MLP, Conv
from bbvi_conv.program.aten_graph import to_graph

SMOOTH = [nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softplus(2.0), nn.SiLU(), nn.GELU(), nn.GELU("tanh")]
SMOOTH += [nn.Softsign(), nn.ELU(), SoftClipping(-30.0, 30.0, 3.0)]


@pytest.mark.parametrize("layer", SMOOTH, ids=str)
def test_activations_meet_their_constants(layer: nn.Module) -> None:
    x = torch.linspace(-35, 35, 700_001, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    said = constants(layer)
    for measured, bound in ((slope, said.lipschitz), (bend, said.smoothness)):
        assert 0.999 * bound < float(measured.detach().abs().max()) <= bound * (1 + 1e-9)
    y = y.detach()
    assert said.low <= float(y.min())
    assert float(y.max()) <= said.high
    for bound, end in ((said.low, float(y.min())), (said.high, float(y.max()))):
        assert not math.isfinite(bound) or abs(bound - end) < 0.05


def largest_stretch(network: nn.Module, x: Tensor) -> float:
    """Largest operator norm of the Jacobian over the rows of ``x``."""
    return float(torch.linalg.matrix_norm(vmap(jacrev(network))(x).detach(), 2).max())


@pytest.mark.parametrize("rows", [1, 3, 6, 20])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_bounded_layer_stays_under_its_norm(rows: int, scale: float) -> None:
    layer = BoundedLinear(6, rows, norm=1.5).double()
    weight = scale * torch.randn(rows, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    used = torch.linalg.matrix_norm(layer.bounded_weight().detach(), 2)
    assert float(used) <= layer.norm * (1 + 1e-12)
    free = torch.linalg.matrix_norm(weight, 2)
    rank = min(rows, 6)
    # from below: c |W| / (c^4 + r |W|^4)^(1/4), since the Schatten norm is at most r^(1/4) times the operator norm
    assert float(used) >= float(layer.norm * free / (layer.norm**4 + rank * free**4) ** 0.25) * (1 - 1e-12)


def test_a_bounded_network_keeps_its_promises() -> None:
    generator = torch.Generator().manual_seed(1)
    network = bounded_mlp([5, 8, 3], -2.0, 2.0, norm=1.3, sharpness=2.0).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 3, generator=generator)
    x = 2 * torch.randn(2000, 5, generator=generator, dtype=torch.float64)
    said = constants(network)
    assert said.lipschitz == pytest.approx(1.3**2 * network[-1].slope)
    assert 0.1 * said.lipschitz < largest_stretch(network, x) <= said.lipschitz
    y = network(1e6 * x).detach()
    assert said.bounded
    assert float(y.abs().max()) <= 2.0
    jacobian = vmap(jacrev(network))
    step = 1e-4 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    turned = torch.linalg.matrix_norm((jacobian(x + step) - jacobian(x)).detach(), 2) / step.norm(dim=-1)
    assert float(turned.max()) <= said.smoothness < math.inf
    torch.testing.assert_close(to_graph(lambda x: network(x), x)(x), network(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        nn.Conv1d(4, 2, 5),
    ],
    ids=str,
)
def test_convolutions_are_bounded_from_above(layer: nn.Module) -> None:
    shape = (4, 9) if isinstance(layer, nn.Conv1d) else (4, 9, 9)
    layer, generator = layer.double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.uniform_(-1, 1, generator=generator)
    zero = torch.zeros(shape, dtype=torch.float64)
    matrix = jacrev(lambda x: layer(x[None])[0])(zero).detach().reshape(-1, zero.numel())
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    assert exact <= operator_norm(layer) < 8 * exact


def test_a_positive_kernel_meets_the_bound_on_a_torus() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular").double()
    with torch.no_grad():
        layer.weight.uniform_(0, 1, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 1, 7, 7, dtype=torch.float64)  # the singular vector of the largest singular value
    stretch = (layer(ones) - layer(0 * ones)).norm() / ones.norm()
    assert float(stretch.detach()) == pytest.approx(operator_norm(layer), rel=1e-12)


def test_constants_compose() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    norms = [operator_norm(layer) for layer in (first, second)]
    said = constants(nn.Sequential(first, nn.Tanh(), nn.Sequential(second, nn.Flatten())))
    assert said.lipschitz == pytest.approx(norms[0] * norms[1])
    assert said.smoothness == pytest.approx(norms[1] * norms[0] ** 2 * 4 / (3 * math.sqrt(3)))
    assert not said.bounded
    clipped = constants(nn.Sequential(first, SoftClipping(0.0, 1.0), nn.Flatten()))
    assert (clipped.low, clipped.high) == (0.0, 1.0)


@pytest.mark.parametrize("encoder", [MLP((5, 3)), Conv((2, 3), 4)], ids=str)
def test_encoders_of_the_library_are_known(encoder: MLP | Conv) -> None:
    network, _ = encoder.network((8, 8))
    x = torch.randn(20, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    said = constants(network.double())
    jacobian = vmap(jacrev(lambda one: network(one[None])[0]))(x).flatten(2).detach()
    assert 0 < float(torch.linalg.matrix_norm(jacobian, 2).max()) <= said.lipschitz < math.inf
    assert said.smoothness < math.inf


def test_what_spoils_a_bound_is_named() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ELU(0.5))
    said = constants(network)
    assert said.smoothness == math.inf
    assert "ReLU" in said.why
    assert kinks(network) == ["1 (ReLU)", "3 (ELU)"]
    unknown = constants(nn.Sequential(nn.Linear(2, 2), nn.PReLU(), SoftClipping(0.0, 1.0)))
    assert math.isnan(unknown.lipschitz)
    assert unknown.bounded
    assert "PReLU" in unknown.why
    padded = constants(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    assert math.isnan(padded.lipschitz)
    assert "Conv2d" in padded.why


def test_no_activation_of_the_table_is_left_out() -> None:
    tested = {type(layer) for layer in SMOOTH} | {nn.ReLU, nn.LeakyReLU}
    assert set(ACTIVATIONS) == tested
    assert constants(nn.LeakyReLU(2.0)).lipschitz == 2.0


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_bad_norms(norm: float) -> None:
    with pytest.raises(ValueError, match="norm must be positive and finite"):
        BoundedLinear(1, 1, norm)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="sizes must name the inputs and the outputs at least"):
        bounded_mlp([3], 0.0, 1.0)
