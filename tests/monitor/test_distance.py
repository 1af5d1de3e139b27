"""The distances from given gradients and matrices: U-statistics in nats, dense and by products, and their refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bbvi_conv.monitor.distance import (
    RESIDUAL,
    Products,
    conjugate_gradients,
    equilibration,
    half_norm,
    half_norm_by_products,
    paired_improvement,
    scaled,
)
from bbvi_conv.monitor.intervals import Estimate, unavailable


def spd(size: int, condition: float, seed: int = 0) -> Tensor:
    """A symmetric matrix with eigenvalues from 1 to ``condition``, evenly spaced in log."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.logspace(0, math.log10(condition), size, dtype=torch.float64)
    return basis * spectrum @ basis.T


def by_products(gradients: Tensor, products: Products, name: str) -> Estimate:
    return half_norm_by_products(gradients, products, equilibration(products, gradients[0]), name)


def noisy(mean: Tensor, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(count, len(mean), generator=generator, dtype=torch.float64)


def test_half_norm_is_unbiased_where_the_plain_one_is_not() -> None:
    size, count, replications = 40, 16, 400
    matrix = spd(size, 100.0)
    mean = 0.2 * torch.ones(size, dtype=torch.float64)
    exact = 0.5 * float(mean @ torch.linalg.solve(matrix, mean))
    values, plain = [], []
    for seed in range(replications):
        gradients = noisy(mean, count, seed)
        values.append(half_norm(gradients, matrix, "the matrix").value)
        average = gradients.mean(0)
        plain.append(0.5 * float(average @ torch.linalg.solve(matrix, average)))
    u, v = torch.tensor(values), torch.tensor(plain)
    stderr = float(u.std()) / math.sqrt(replications)
    assert abs(float(u.mean()) - exact) < 4 * stderr
    assert float(v.mean()) - exact > 20 * stderr  # the bias tr(A^-1)/2J that U does not have


def test_products_agree_with_the_dense_matrix_without_noise() -> None:
    matrix = spd(60, 10.0)
    gradient = torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    same = gradient.expand(8, -1)
    dense = half_norm(same, matrix, "A")
    products = by_products(same, lambda v: v @ matrix, "A")
    # b'(A^-1 b - x) = r'A^-1 r for conjugate gradients, at most RESIDUAL^2 |b|^2 / smallest eigenvalue
    slack = 0.5 * RESIDUAL**2 * float(gradient @ gradient)
    assert dense.value == pytest.approx(0.5 * float(gradient @ torch.linalg.solve(matrix, gradient)), rel=1e-10)
    assert dense.value - slack <= products.value <= dense.value + 1e-10


def test_products_are_unbiased_and_their_interval_covers() -> None:
    size, count, replications = 30, 32, 400
    matrix = spd(size, 10.0, seed=3)
    mean = torch.full((size,), 0.3, dtype=torch.float64)
    exact = 0.5 * float(mean @ torch.linalg.solve(matrix, mean))
    found = [by_products(noisy(mean, count, seed), lambda v: v @ matrix, "A") for seed in range(replications)]
    values = torch.tensor([e.value for e in found])
    stderr = float(values.std()) / math.sqrt(replications)
    assert stderr < 0.03 * exact
    assert abs(float(values.mean()) - exact) < 4 * stderr + RESIDUAL**2 * exact * 10
    covered = sum(e.low <= exact <= e.high for e in found) / replications
    assert covered > 0.95 - 4 * math.sqrt(0.95 * 0.05 / replications)


@pytest.mark.parametrize("smallest", [-1.0, 0.0])
def test_a_matrix_that_is_not_positive_definite_gives_a_reason(smallest: float) -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, smallest], dtype=torch.float64))
    gradients = noisy(torch.ones(3, dtype=torch.float64), 16, 0)
    for found in (half_norm(gradients, matrix, "H"), by_products(gradients, lambda v: v @ matrix, "H")):
        assert found.value is None
        assert found.reason.startswith("H ")
    assert "not positive definite" in half_norm(gradients, matrix, "H").reason


def test_conjugate_gradients_say_when_they_give_up() -> None:
    matrix = spd(400, 1e8, seed=2)
    answer = conjugate_gradients(lambda v: v @ matrix, torch.ones(2, 400, dtype=torch.float64), matrix.diagonal())
    assert isinstance(answer, str)
    assert "too ill-conditioned" in answer
    still = conjugate_gradients(lambda v: v @ matrix, torch.zeros(2, 400, dtype=torch.float64), matrix.diagonal())
    assert torch.equal(still, torch.zeros(2, 400, dtype=torch.float64))


def test_each_row_is_solved_when_its_time_comes() -> None:
    """One that is zero, one that is an eigenvector and done at once, and one that needs all others."""
    matrix = spd(50, 30.0, seed=4)
    easy = torch.linalg.eigh(matrix).eigenvectors[:, 3]
    b = torch.stack([torch.zeros_like(easy), easy, torch.ones_like(easy)])
    found = conjugate_gradients(lambda v: v @ matrix, b, torch.ones(50, dtype=torch.float64))
    assert isinstance(found, Tensor)
    assert torch.equal(found[0], b[0])
    for x, row in zip(found[1:], b[1:], strict=True):
        exact = torch.linalg.solve(matrix, row)
        assert (x - exact).norm() < 0.2 * exact.norm()


def test_units_of_parameters_do_not_matter_to_products() -> None:
    """Scales from 10^-3 to 10^3: the residual of what is small counts as much, and no more products are needed."""
    scales = torch.logspace(-3, 3, 300, dtype=torch.float64)
    matrix = spd(300, 10.0, seed=5)
    gradient = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = []

    def products(vectors: Tensor) -> Tensor:
        made.append(len(vectors))
        return vectors * scales @ matrix * scales

    exact = 0.5 * float(gradient @ torch.linalg.solve(matrix, gradient))
    found = by_products((scales * gradient).expand(8, -1), products, "A")
    assert found.value == pytest.approx(exact, rel=0.02)
    assert sum(made) < 70


def test_equilibration_finds_the_scales() -> None:
    entries = torch.logspace(-6, 2, 40, dtype=torch.float64)
    torch.testing.assert_close(equilibration(lambda v: v * entries, entries), entries, rtol=1e-12, atol=0)
    whole = spd(40, 5.0) * entries.sqrt() * entries.sqrt()[:, None]
    scale = equilibration(lambda v: v @ whole, entries)
    norms = (whole / scale.sqrt() / scale.sqrt()[:, None]).norm(dim=1)
    assert 0.2 < float(norms.min()) < float(norms.max()) < 5
    assert float(whole.norm(dim=1).max() / whole.norm(dim=1).min()) > 1e3


def pairs(correlation: float, size: int = 1000) -> Tensor:
    """Blocks (1, -r; -r, 1) along the diagonal."""
    block = torch.tensor([[1.0, -correlation], [-correlation, 1.0]], dtype=torch.float64)
    return torch.block_diag(*[block] * (size // 2))


def walk(level: float, size: int = 1000) -> Tensor:
    """Precision of a random walk held by weak observations."""
    ones = torch.ones(size - 1, dtype=torch.float64)
    whole = (2 + level) * torch.eye(size, dtype=torch.float64)
    return whole - torch.diag(ones, 1) - torch.diag(ones, -1)


@pytest.mark.parametrize("drawn", ["as the gradient of a displacement", "like the diagonal"])
@pytest.mark.parametrize(
    "matrix",
    [pairs(0.9), pairs(0.99), pairs(0.9999), walk(0.1), walk(0.01)],
    ids=["pairs .9", "pairs .99", "pairs .9999", "walk .1", "walk .01"],
)
def test_strong_correlations_leave_no_half_of_the_distance_out(matrix: Tensor, drawn: str) -> None:
    """In units over three decades: signs that cancel in a row, and directions of little curvature."""
    units = torch.logspace(-1.5, 1.5, len(matrix), dtype=torch.float64)
    matrix = matrix * units * units[:, None]
    z = torch.randn(len(matrix), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    b = torch.linalg.cholesky(matrix) @ z if drawn.startswith("as") else matrix.diagonal().sqrt() * z
    found = conjugate_gradients(lambda v: v @ matrix, b[None], equilibration(lambda v: v @ matrix, b))
    assert isinstance(found, Tensor)
    assert float(b @ found[0]) == pytest.approx(float(b @ torch.linalg.solve(matrix, b)), rel=0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_products_that_are_not_finite_give_a_reason(bad: float) -> None:
    entries = torch.tensor([1.0, 1.0, 1.0, bad], dtype=torch.float64)
    found = by_products(noisy(torch.ones(4, dtype=torch.float64), 16, 0), lambda v: v * entries, "H")
    assert found.value is None
    assert found.reason == "H has products that are not finite"


def test_large_entries_do_not_overflow_in_single_precision() -> None:
    entries = torch.tensor([1.0, 1.0, 1.0, 3e19])
    found = by_products(noisy(torch.ones(4, dtype=torch.float64), 16, 0).float(), lambda v: v * entries, "H")
    assert found.value == pytest.approx(1.5, abs=0.7)


def test_the_paired_interval_covers_at_its_level() -> None:
    size, replications, truth = 64, 1000, 0.02
    generator = torch.Generator().manual_seed(0)
    covered, unpaired_wider = 0, 0
    for _ in range(replications):
        shared = 3.0 * torch.randn(size, generator=generator, dtype=torch.float64)
        after = shared + 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)
        found = paired_improvement(shared + truth, after)
        covered += found.low <= truth <= found.high
        unpaired = math.sqrt(float((shared + truth).var() + after.var()) / size)
        unpaired_wider += 1.96 * unpaired > 10 * (found.high - found.low) / 2
    stderr = math.sqrt(0.95 * 0.05 / replications)
    assert abs(covered / replications - 0.95) < 4 * stderr
    assert unpaired_wider == replications  # what common random numbers are for


def test_a_loss_that_is_not_finite_has_no_improvement() -> None:
    found = paired_improvement(torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan]))
    assert found.value is None
    assert "lower the step size" in found.reason


def test_units_change_numbers_and_leave_reasons() -> None:
    assert scaled(Estimate(1.0, 0.5, 2.0), 10.0) == Estimate(10.0, 5.0, 20.0)
    assert scaled(unavailable("why"), 10.0) == unavailable("why")


def test_curvature_that_is_not_finite_is_told_as_such() -> None:
    matrix = torch.eye(3)
    matrix[1, 1] = math.nan
    found = half_norm(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), matrix, "the matrix")
    assert found.value is None
    assert "the matrix is not finite" in found.reason
    assert "logaddexp" in found.reason
