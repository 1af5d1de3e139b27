"""Projections and the proximal map are the nearest points they claim to be; steps made of them trace and map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bbvi_conv.optim import (
    SGD,
    Adam,
    Ball,
    Constant,
    InverseSqrt,
    Optimiser,
    Projected,
    ProjectedSGD,
    ProximalSGD,
    ScaleFloor,
    Scales,
    TheoremAdam,
    gradient_mapping,
)
from bbvi_conv.optim.proximal import prox_minus_log
from bbvi_conv.program.aten_graph import to_graph

SCALES = Scales(((2, False), (3, True), (1, False), (1, True)), entropy=0.7)
ARE_SCALES = torch.tensor([0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
ONE = torch.tensor(1.0, dtype=torch.float64)


def points(count: int = 200, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(count, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("convex", [Ball(2.0), ScaleFloor(0.5, SCALES)], ids=str)
def test_projections_are_nearest_points(convex: Any) -> None:
    x = torch.cat([points(), 0.7 + points(spread=0.05)])
    nearest = convex.project(x)
    torch.testing.assert_close(convex.project(nearest), nearest, rtol=1e-15, atol=0)
    # y = P(x) iff (x - y, z - y) <= 0 for every z of the set
    others = convex.project(points(spread=1.0))
    angles = ((x - nearest)[:, None] * (others[None] - nearest[:, None])).sum(-1)
    assert float(angles.max()) <= 1e-12
    assert float((nearest - x).norm(dim=-1).max()) > 1  # some were outside
    assert bool((nearest == x).all(-1).any())  # and some inside


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("convex", [Ball(2.0), ScaleFloor(0.5, SCALES)], ids=str)
def test_what_a_projection_moved_is_on_the_boundary(convex: Any, dtype: torch.dtype) -> None:
    x = torch.cat([points(), 0.7 + points(spread=0.05)]).to(dtype)
    nearest = convex.project(x)
    moved = (nearest != x).any(-1)
    assert 0 < int(moved.sum()) < len(x)
    assert [convex.on_boundary(y) for y in nearest] == moved.tolist()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("convex", [Ball(2.0), ScaleFloor(0.5, SCALES)], ids=str)
def test_no_projection_hides_a_number_that_is_not_finite(convex: Any, value: float) -> None:
    """Compiled steps are told by their end whether all of them were finite."""
    x = torch.full((7, 7), 0.1, dtype=torch.float64).fill_diagonal_(value)
    assert not torch.isfinite(convex.project(x)).all(-1).any()


def test_only_scales_have_a_floor() -> None:
    x = points()
    floored = ScaleFloor(0.5, SCALES).project(x)
    assert torch.equal(floored[:, ~ARE_SCALES], x[:, ~ARE_SCALES])
    assert torch.equal(floored[:, ARE_SCALES], x[:, ARE_SCALES].clamp(min=0.5))
    assert torch.equal(SCALES.of(x), x[:, ARE_SCALES])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weight", [1e-8, 1e-2, 1.0, 1e3])
def test_the_proximal_map_solves_its_equation(weight: float, dtype: torch.dtype) -> None:
    size = torch.logspace(-6, 6, 49, dtype=dtype)
    s = torch.cat([-size, size.new_zeros(1), size])
    t = prox_minus_log(s, weight)
    assert bool((t > 0).all())
    # the minimum of -w log t + (t - s)^2 / 2 is where t (t - s) = w
    left = t.double() * (t.double() - s.double())
    slack = 4 * torch.finfo(dtype).eps * (t.double().square() + (t * s).double().abs())
    assert bool(((left - weight).abs() <= slack + 4 * torch.finfo(dtype).eps * weight).all())


def test_a_proximal_step_takes_the_energy_gradient() -> None:
    x, grad, n = points(1)[0].abs(), points(2)[1], 4 * ONE
    optimiser = ProximalSGD(InverseSqrt(0.3)).bind(SCALES)
    moved, state = optimiser.update(grad, (), x, n)
    assert state == ()
    size = 0.15
    energy = grad + torch.where(ARE_SCALES, 0.7 / x, 0.0)
    y = x - size * energy
    wanted = torch.where(ARE_SCALES, 0.5 * (y + (y * y + 4 * size * 0.7).sqrt()), y)
    torch.testing.assert_close(moved, wanted, rtol=1e-12, atol=1e-13)


BOUND: list[Optimiser] = [
    ProximalSGD(Constant(0.1)).bind(SCALES),
    ProjectedSGD(Constant(0.1), floor=0.2).bind(SCALES),
    TheoremAdam(0.3, radius=2.0),
    Projected(Adam(Constant(0.1)), ScaleFloor(0.3)).bind(SCALES),
]


@pytest.mark.parametrize("optimiser", BOUND, ids=lambda o: type(o).__name__)
def test_steps_trace_and_map_over_seeds(optimiser: Optimiser) -> None:
    x, grad = points(5).abs(), points(10)[5:]
    state = tuple(torch.stack([part] * 5) for part in optimiser.init(x[0]))

    def step(grad: Tensor, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        moved, after = optimiser.update(grad, state, x, 3 * ONE)
        return (moved, *after)

    graph = to_graph(step, grad[0], x[0], *(part[0] for part in state))
    mapped = torch.vmap(graph)(grad, x, *state)
    for i in range(5):
        one_by_one = step(grad[i], x[i], *(part[i] for part in state))
        for together, alone in zip(mapped, one_by_one, strict=True):
            torch.testing.assert_close(together[i], alone, rtol=1e-13, atol=1e-14)


def test_the_theorems_adam_stays_in_its_ball() -> None:
    optimiser, x = TheoremAdam(1.0, radius=1.5), torch.zeros(7, dtype=torch.float64)
    state, plain, free = optimiser.init(x), Adam(InverseSqrt(1.0)), x
    free_state, norms = plain.init(x), []
    for n in range(1, 50):
        x, state = optimiser.update(x - 2.0, state, x, n * ONE)
        free, free_state = plain.update(free - 2.0, free_state, free, n * ONE)
        norms.append(float(x.norm()))
    assert max(norms) <= 1.5 * (1 + 1e-12)
    assert norms[-1] == pytest.approx(1.5)
    assert float(free.norm()) > 3


def test_the_gradient_mapping_is_the_gradient_inside_and_nothing_pushes_against_a_floor() -> None:
    optimiser = ProjectedSGD(InverseSqrt(0.5), floor=0.25).bind(SCALES)
    x, grad = torch.full((7,), 1.0, dtype=torch.float64), points(1)[0]
    torch.testing.assert_close(gradient_mapping(optimiser, 0.1 * grad, x, ONE), 0.1 * grad, rtol=1e-12, atol=1e-13)
    at_floor = torch.where(ARE_SCALES, 0.25, x)
    mapping = gradient_mapping(optimiser, grad.abs(), at_floor, ONE)
    assert mapping[ARE_SCALES].tolist() == [0.0] * 4
    torch.testing.assert_close(mapping[~ARE_SCALES], grad.abs()[~ARE_SCALES], rtol=1e-12, atol=1e-13)
    edge, small = 2 * x / x.norm(), 1e-6
    outwards = grad - (grad @ edge) * edge / 4 - 3 * edge  # downhill lies outside the ball
    tangent = gradient_mapping(Projected(SGD(Constant(small)), Ball(2.0)), outwards, edge, ONE)
    torch.testing.assert_close(tangent, outwards + 3 * edge, rtol=0, atol=100 * small)
    with pytest.raises(TypeError, match="has a state, so its step defines no gradient mapping"):
        gradient_mapping(TheoremAdam(0.1, 1.0), grad, x, ONE)


def settled(optimiser: Callable[[Tensor, Tensor, Tensor], Tensor], estimator: str, steps: int = 4000) -> Tensor:
    """Mean scale over the second half of a run of 50 chains on a standard normal, one draw a step."""
    noise = torch.randn(steps, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    s, kept = torch.full((50, 1), 0.5, dtype=torch.float64), []
    for n, eps in enumerate(noise, start=1):
        z = s[:, 0] * eps
        energy = z * eps
        score = {"sticking-the-landing": -eps * eps / s[:, 0], "pathwise": -1 / s[:, 0], "energy": 0 * eps}[estimator]
        s = optimiser((energy + score).unsqueeze(-1), s, n * ONE)
        kept.append(s[:, 0])
    return torch.stack(kept)[steps // 2 :].mean(0)


def test_a_proximal_step_on_a_whole_gradient_settles_at_the_wrong_scale() -> None:
    """The entropy is then counted twice: E G = s - 1/s - 1/s vanishes at sqrt 2, not at the posterior's 1."""
    size = 0.01
    right = ProximalSGD(Constant(size), control_variate=True).bind(Scales(((1, True),)))

    def blind(grad: Tensor, x: Tensor, n: Tensor) -> Tensor:
        return prox_minus_log(x - size * grad, size)

    found = settled(blind, "sticking-the-landing")
    error = float(found.std()) / len(found) ** 0.5
    assert abs(float(found.mean()) - 2**0.5) < 0.03 + 4 * error  # 0.03: steps of 0.01 leave a bias of their order
    assert error < 0.01

    def sound(grad: Tensor, x: Tensor, n: Tensor) -> Tensor:
        return right.update(grad, (), x, n)[0]

    exact = settled(sound, "sticking-the-landing")
    torch.testing.assert_close(exact, torch.ones_like(exact), rtol=0, atol=1e-9)
    energy = settled(sound, "pathwise")
    assert abs(float(energy.mean()) - 1) < 0.03 + 4 * float(energy.std()) / len(energy) ** 0.5


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Ball(0.0), "radius must be positive and finite, got 0.0"),
        (lambda: ProjectedSGD(floor=-1.0), "floor must be positive and finite, got -1.0"),
        (lambda: TheoremAdam(0.1, 1.0, beta1=0.9, beta2=0.8), r"asks for beta1 < sqrt\(beta2\), got beta1=0.9 and"),
        (lambda: TheoremAdam(0.1, radius=-1.0), "radius must be positive and finite"),
        (lambda: ProximalSGD().update(ONE, (), ONE, ONE), "ProximalSGD does not know which parameters are scales"),
        (lambda: ScaleFloor(0.1).project(ONE), "ScaleFloor does not know which parameters are scales"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_an_optimiser_without_scales_binds_to_itself() -> None:
    optimiser = TheoremAdam(0.1, 1.0)
    assert optimiser.bind(SCALES) is optimiser
    assert not optimiser.needs_scales
    assert ProjectedSGD().needs_scales
    assert Projected(SGD(Constant(0.2)), Ball(1.0)).step_size == Constant(0.2)
