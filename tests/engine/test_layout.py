"""Memory order around convolutions."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from bbvi_conv.engine import Stream, make_engine, start_carry
from bbvi_conv.engine.native import NativeLoop
from bbvi_conv.networks import SoftClipping
from bbvi_conv.objectives import ELBO
from bbvi_conv.optim import Adam, Constant
from bbvi_conv.program import Minibatch
from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.build import build


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("channels", "planes"), [(1, 0), (3, 2), (16, 1)])
def test_order_of_images_around_convolutions(channels: int, planes: int, transposed: bool) -> None:
    """The result and the gradient that enters are plane by plane where channels would not fill a vector.

    So is a result that becomes a row of numbers.

    Everything a convolution reads is channels last, and all gradients are what they were. A transposed one to few
    channels is not there: whole blocks of its result are.
    """
    from bbvi_conv.engine.native.inductor import force_stride_order
    from bbvi_conv.engine.native.layout import Ordered

    def gradients(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            convolve = nn.functional.conv_transpose2d if transposed else nn.functional.conv2d
            flat = convolve(x, weight, bias, 2, 1).view(5, -1)
            return flat.sigmoid().square().sum()

        return torch.func.grad(loss, argnums=(0, 1, 2))(x, weight, bias)

    side = 16 if transposed else 4
    weight = torch.randn((2, channels, 4, 4) if transposed else (channels, 2, 4, 4))
    given = (torch.randn(5, 2, 8, 8), weight, torch.randn(channels))
    graph = make_fx(gradients)(*given)
    ordered = make_fx(Ordered(graph, 512).run)(*given)
    made = [node for node in ordered.graph.nodes if node.target is force_stride_order]
    blocks = transposed and channels < 4
    assert [n.args[1] for n in made].count([side**2 * channels, side**2, side, 1]) == planes - (blocks and planes > 0)
    (forward,) = ordered.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    assert forward.args[6] == (transposed and not blocks)
    for node in ordered.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution_backward.default):
        assert all(n.meta["val"].is_contiguous(memory_format=torch.channels_last) for n in node.args[:3])
        assert node.args[-1][2] != transposed  # whose bias torch sums
    for value, expected in zip(ordered(*given), gradients(*given), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stride", "kernel", "padding", "taps"),
    [
        (2, 4, 1, 3),
        (2, 2, 0, 1),
        (2, 6, 2, 3),
        (3, 5, 1, 3),
        (4, 8, 2, 3),
        (2, 3, 1, None),
        (2, 5, 1, None),
        (1, 3, 1, None),
    ],
)
def test_a_transposed_convolution_as_one_of_stride_1(stride: int, kernel: int, padding: int, taps: int | None) -> None:
    from bbvi_conv.engine.native.layout import _block, _of_blocks

    gen = torch.Generator().manual_seed(0)
    image, weight = (torch.randn(size, generator=gen) for size in ((2, 5, 6, 7), (5, 3, kernel, kernel)))
    side = _block(weight, [stride] * 2, [padding] * 2, [1, 1], True, [0, 0], 1)
    assert side == (None if taps is None else stride)
    if side is not None:
        made = _of_blocks(weight, side, padding)
        assert made.shape == (3 * side**2, 5, taps, taps)
        ours = nn.functional.pixel_shuffle(nn.functional.conv2d(image, made, padding=taps // 2), side)
        torch.testing.assert_close(ours, nn.functional.conv_transpose2d(image, weight, None, stride, padding))
    plain = {"dilation": [1, 1], "transposed": True, "more": [0, 0], "groups": 1}
    for other in ({"dilation": [2, 2]}, {"transposed": False}, {"more": [1, 1]}, {"groups": 5}):
        assert _block(weight, [stride] * 2, [padding] * 2, **(plain | other)) is None


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


def test_an_operand_that_a_sum_reads_before_the_product_is_computed_once(generated: Callable[[], str]) -> None:
    """And in the order of the product before: no transposes between."""
    rows = torch.randn(500, 40)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        residual = torch.ops.aten.softplus_backward(torch.ones(16, 500), (rows @ x).t(), 1, 40)
        return residual.sum(1), rows.t() @ residual.t()

    x = torch.randn(40, 16)
    loop = NativeLoop(to_graph(step, x), [x], 0, 1)
    loop.load()
    _, made = loop([], [x[None]], 1)
    for value, expected in zip(made, step(x), strict=True):
        torch.testing.assert_close(value[0], expected)
    loops = re.sub(r"\btmp\d+", "tmp", generated())
    assert len(re.findall(r"tmp / tmp", loops)) == 1
    assert "transpose_mxn<float,static_cast" not in loops
