"""Memory order around convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from bbvi_conv.engine import Stream, make_engine, start_carry
from bbvi_conv.networks import SoftClipping
from bbvi_conv.objectives import ELBO
from bbvi_conv.optim import Adam, Constant
from bbvi_conv.program import Minibatch
from bbvi_conv.program.build import build


@pytest.mark.parametrize(("channels", "changed"), [(1, 0), (3, 2), (16, 0)])
def test_images_of_few_channels_are_kept_plane_by_plane(channels: int, changed: int) -> None:
    """The result of a convolution and the gradient that enters it, where channels would not fill a vector."""
    from bbvi_conv.engine.native.inductor import force_stride_order
    from bbvi_conv.engine.native.layout import planes_first

    def gradient(x: Tensor, weight: Tensor) -> Tensor:
        def loss(weight: Tensor) -> Tensor:
            return nn.functional.conv2d(x, weight, None, 2, 1).sigmoid().square().sum()

        return torch.func.grad(loss)(weight)

    x, weight = torch.randn(5, 2, 8, 8), torch.randn(channels, 2, 4, 4)
    graph = planes_first(make_fx(gradient, tracing_mode="fake")(x, weight), 512)
    made = [node for node in graph.graph.nodes if node.target is force_stride_order]
    assert [node.args[1] for node in made] == [[16 * channels, 16, 4, 1]] * changed
    torch.testing.assert_close(graph(x, weight), gradient(x, weight))


def test_compiled_convolutions_have_the_iterates_of_traced_ones(coder) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Unflatten(-1, (3, 8, 8)), nn.Conv2d(3, 8, 4, 2, 1), nn.SiLU(), nn.Flatten())
    decoder = nn.Sequential(nn.Linear(2, 128), nn.Unflatten(-1, (8, 4, 4)), nn.ConvTranspose2d(8, 3, 4, 2, 1))
    model, guide = coder(encoder.append(nn.Linear(128, 4)), decoder.extend([SoftClipping(0.0, 1.0), nn.Flatten()]))
    program = build(model, guide, (torch.rand(20, 192),), minibatch=Minibatch(5, plate="data"), dtype=torch.float32)
    rule, ends = Adam(Constant(1e-2)), []
    for name in ("compiled", "traced"):
        engine = make_engine(name, program, ELBO(), rule)
        carry, losses = engine.advance(start_carry(rule, program.initial()), Stream(program, 0, "optimise", 1), 0, 20)
        ends.append((carry.x, losses))
    (ours, losses), (theirs, expected) = ends
    moved = (theirs - program.initial()).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 1e-3 * moved
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
