"""Laws of U and its interval: unbiased, covering, and not the plain squared norm of the mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bbvi_conv.monitor import SquaredNorm, gram_matrix, squared_norm, total_gram
from bbvi_conv.monitor.gradient_norm import squared_norm_of_draws, trace_of_covariance
from bbvi_conv.monitor.intervals import student_quantile

J = 32


def draws(
    replications: int, spectrum: Tensor, gradient: Tensor, seed: int, kind: str = "gaussian", j: int = J
) -> Tensor:
    """I.i.d. gradients ``(replications, j, d)`` with mean ``gradient`` and covariance diag(``spectrum``)."""
    generator, shape = torch.Generator().manual_seed(seed), (replications, j, len(spectrum))
    if kind == "gaussian":
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    elif kind == "exponential":
        noise = torch.empty(shape, dtype=torch.float64).exponential_(generator=generator) - 1.0
    else:  # Student t with 5 degrees of freedom, unit variance
        chi_square = torch.randn((*shape, 5), generator=generator, dtype=torch.float64).square().sum(-1)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64) * (3.0 / chi_square).sqrt()
    return gradient + noise * spectrum.sqrt()


def looks(gradients: Tensor) -> list[SquaredNorm]:
    return [squared_norm(gram) for gram in gradients @ gradients.mT]


def column(records: list[SquaredNorm], field: str) -> np.ndarray:
    return np.array([getattr(record, field) for record in records])


def distance(sample: np.ndarray, truth: float) -> float:
    """Distance of the mean of ``sample`` from ``truth``, in standard errors."""
    return float((sample.mean() - truth) / (sample.std(ddof=1) / math.sqrt(len(sample))))


def test_u_is_unbiased_where_the_plain_norm_is_not() -> None:
    spectrum, gradient = torch.ones(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    gradient[0] = 0.5
    records = looks(draws(400, spectrum, gradient, seed=1, j=16))
    plain = column(records, "mean_norm_sq_biased")
    assert abs(distance(column(records, "value"), 0.25)) < 4
    assert distance(plain, 0.25) > 20
    assert abs(distance(plain, 0.25 + 1000 / 16)) < 4


@pytest.mark.parametrize("kind", ["gaussian", "exponential"])
def test_noise_moments_are_unbiased_whatever_the_distribution(kind: str) -> None:
    spectrum = 1.0 / torch.arange(1, 6, dtype=torch.float64)
    gradients = draws(4000, spectrum, torch.full((5,), 3.0, dtype=torch.float64), seed=2, kind=kind, j=8)
    records = looks(gradients)
    assert abs(distance(column(records, "trace_sigma"), float(spectrum.sum()))) < 4
    truth = float(spectrum.square().sum())
    assert abs(distance(column(records, "trace_sigma_sq"), truth)) < 4
    if kind == "exponential":  # the usual debiasing assumes Gaussian draws and is visibly off
        centred = gradients - gradients.mean(1, keepdim=True)
        covariance = centred.mT @ centred / 7
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        assumed = 49 / (6 * 9) * (covariance.square().sum((-2, -1)) - trace.square() / 7)
        assert distance(assumed.numpy(), truth) > 8


def test_the_variance_of_u_is_the_stated_one() -> None:
    spectrum = torch.tensor([4.0, 1.0, 1.0, 0.25], dtype=torch.float64)
    gradient = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    values = column(looks(draws(6000, spectrum, gradient, seed=3)), "value")
    along, trace_sq = float((gradient.square() * spectrum).sum()), float(spectrum.square().sum())
    truth = 4 * along / J + 2 * trace_sq / (J * (J - 1))
    assert abs(distance((values - 5.0) ** 2, truth)) < 4
    assert abs(distance((values - 5.0) ** 2, truth / 1.5)) > 8


def cells() -> list[tuple[str, int, float, str]]:
    sizes = (0.0, 0.1, 1.0, 10.0)
    return [
        (shape, d, size, direction)
        for shape in ("flat", "steep")
        for d in (5, 50)
        for size in sizes
        for direction in (("even", "leading") if size else ("even",))
    ]


def misses(
    spectrum: Tensor, size: float, direction: str, seed: int, replications: int, kind: str
) -> tuple[float, float]:
    """Shares of intervals wholly below and wholly above the truth, at ||g||^2 = size tr Sigma / J."""
    d, truth = len(spectrum), size * float(spectrum.sum()) / J
    unit = (
        torch.full((d,), d**-0.5, dtype=torch.float64) if direction == "even" else torch.eye(d, dtype=torch.float64)[0]
    )
    records = looks(draws(replications, spectrum, unit * math.sqrt(truth), seed, kind))
    return float((column(records, "high") < truth).mean()), float((column(records, "low") > truth).mean())


@pytest.mark.parametrize(("shape", "d", "size", "direction"), cells())
def test_interval_covers(
    shape: str, d: int, size: float, direction: str, record_property: Callable[[str, float], None]
) -> None:
    spectrum = (
        torch.ones(d, dtype=torch.float64) if shape == "flat" else torch.arange(1, d + 1, dtype=torch.float64) ** -2
    )
    truth_above, truth_below = misses(spectrum, size, direction, seed=4, replications=1000, kind="gaussian")
    record_property("coverage", 1 - truth_above - truth_below)
    record_property("truth above the interval", truth_above)
    assert truth_above + truth_below <= 0.08
    assert truth_above <= 0.04


def test_interval_covers_where_the_noise_along_the_gradient_is_underestimated() -> None:
    """Leading direction of 1/i in 50 dimensions: with the normal quantile and lambda not debiased it covers 91%."""
    spectrum = 1.0 / torch.arange(1, 51, dtype=torch.float64)
    truth_above, truth_below = misses(spectrum, 1.0, "leading", seed=5, replications=4000, kind="gaussian")
    assert truth_above + truth_below <= 0.08
    assert truth_above <= 0.04


@pytest.mark.parametrize("size", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("d", [5, 50])
def test_interval_covers_heavy_tails(d: int, size: float) -> None:
    spectrum = torch.ones(d, dtype=torch.float64)
    truth_above, truth_below = misses(spectrum, size, "even", seed=6, replications=500, kind="student")
    assert truth_above + truth_below <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 500)


def test_ends_solve_the_inequality_with_equality() -> None:
    spectrum = torch.arange(1, 21, dtype=torch.float64) ** -1
    gradient = torch.full((20,), 0.4, dtype=torch.float64)
    for record in looks(draws(20, spectrum, gradient, seed=7)):
        z = student_quantile(0.95, J - 1)
        assert record.low > 0
        for end in (record.low, record.high):
            band = z * math.sqrt(record.variance_slope * end + record.variance_floor)
            assert abs(record.value - end) == pytest.approx(band, rel=1e-9)


def test_interval_does_not_shrink_below_the_noise_band_when_u_is_very_negative() -> None:
    gradients = draws(1, torch.ones(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64), seed=8)[0]
    record = squared_norm(gram_matrix(gradients - gradients.mean(0)))  # mean exactly zero: U = -tr Sigma / J
    band = student_quantile(0.95, J - 1) * math.sqrt(record.variance_floor)
    assert record.value < -10 * math.sqrt(record.variance_floor)
    assert record.low == 0.0
    assert record.high == pytest.approx(band, rel=1e-12)


def test_units_and_rotations() -> None:
    gradients = draws(1, torch.ones(6, dtype=torch.float64), torch.full((6,), 0.3, dtype=torch.float64), seed=9)[0]
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    plain, turned = squared_norm(gram_matrix(gradients)), squared_norm(gram_matrix(gradients @ rotation))
    scaled = squared_norm(gram_matrix(1e-3 * gradients))
    assert turned == pytest.approx(plain, rel=1e-10)
    for field in ("value", "low", "high", "trace_sigma", "noise_scale", "mean_norm_sq_biased"):
        assert getattr(scaled, field) == pytest.approx(1e-6 * getattr(plain, field), rel=1e-9)


def test_groups_add() -> None:
    gradients = draws(1, torch.ones(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64), seed=10)[0]
    grams = {
        "theta": gram_matrix([gradients[:, :1], gradients[:, 1:3].unsqueeze(-1)]),
        "phi": gram_matrix(gradients[:, 3:]),
    }
    assert torch.allclose(total_gram(grams), gram_matrix(gradients), rtol=1e-13, atol=0)
    parts = sum(squared_norm(gram).value for gram in grams.values())
    assert squared_norm(total_gram(grams)).value == pytest.approx(parts, rel=1e-12)


def test_gram_of_single_precision_gradients_is_taken_in_double() -> None:
    gradients = torch.full((4, 300_000), 0.1, dtype=torch.float32)
    gram = gram_matrix(gradients)
    assert gram.dtype == torch.float64
    assert float(gram[0, 1]) == pytest.approx(300_000 * float(gradients[0, 0]) ** 2, rel=1e-12)


def test_noiseless_gradients_have_no_interval() -> None:
    record = squared_norm(gram_matrix(torch.full((5, 3), 2.0)))
    assert record.estimate == (12.0, 12.0, 12.0, "")
    assert record.standard_error == 0.0
    assert squared_norm(torch.zeros(4, 4)).estimate == (0.0, 0.0, 0.0, "")


def test_gradients_at_the_end_of_float32_still_have_figures() -> None:
    largest = 1e37 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    record = squared_norm(gram_matrix(largest))
    assert all(math.isfinite(number) for number in record)


def test_the_trace_is_that_of_the_covariance() -> None:
    gradients = 5.0 + torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = trace_of_covariance(gram_matrix(gradients))
    assert found == pytest.approx(float(gradients.var(0).sum()), rel=1e-12)
    gradients[2, 1] = math.inf
    assert math.isnan(trace_of_covariance(gram_matrix(gradients)))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="num_gradients must be at least 4"):
        squared_norm(torch.eye(3))
    with pytest.raises(ValueError, match=r"square matrix \(J, J\)"):
        squared_norm(torch.zeros(4, 5))
    for spoilt in (float("nan"), float("inf"), 1e80):
        with pytest.raises(ValueError, match="not finite"):
            squared_norm(torch.full((4, 4), spoilt, dtype=torch.float64))
    with pytest.raises(ValueError, match="same leading dimension"):
        gram_matrix([torch.zeros(4, 2), torch.zeros(5, 2)])
    with pytest.raises(ValueError, match="no leaf"):
        gram_matrix([])
    with pytest.raises(ValueError, match="same J draws"):
        total_gram({"theta": torch.zeros(4, 4), "phi": torch.zeros(5, 5)})
    with pytest.raises(ValueError, match="no group"):
        total_gram({})


@pytest.mark.parametrize("shape", [(40, 3), (6, 5), (5, 9)])
def test_from_draws_or_from_their_products_is_the_same(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = 0.3 + torch.randn(*shape, generator=generator, dtype=torch.float64)
    assert tuple(squared_norm_of_draws(gradients)) == pytest.approx(
        tuple(squared_norm(gram_matrix(gradients))), rel=1e-10
    )
    gradients[2, 1] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        squared_norm_of_draws(gradients)
