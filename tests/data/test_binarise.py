"""Binarisation: white with the grey value as its probability, independently over pixels, images and visits."""

from __future__ import annotations

import math

import pytest
import torch

from bbvi_conv.data import binarised, codes, rebinarised

GREY = torch.arange(256, dtype=torch.uint8).reshape(16, 16)


def test_static_pixels_are_white_with_their_grey_value_as_probability() -> None:
    images = GREY.expand(4000, 16, 16)
    white = (binarised(images, seed=3) == 255).double().mean(0)
    p = GREY.double() / 255
    assert white.unique().min() == 0
    assert ((white - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt()).all()
    assert torch.equal(binarised(images[:5], seed=3), binarised(images[:5], seed=3))
    assert not torch.equal(binarised(images[:5], seed=3), binarised(images[:5], seed=4))


def test_dynamic_pixels_have_the_right_law_and_are_independent() -> None:
    """Frequencies over 4,000 visits within 5 standard errors; correlations of pixels, of visits and of images too.

    Power: the standard error of a correlation is 0.016 here, and a threshold shared by two pixels correlates at 1.
    """
    visits = 4000
    images = torch.stack([GREY, GREY.T, torch.full_like(GREY, 128)])
    seen = rebinarised(images, codes(3, visits)).reshape(visits, 3, 256)
    assert set(seen.unique().tolist()) == {0, 255}
    white = (seen == 255).double()
    p = images.reshape(3, 256).double() / 255
    assert ((white.mean(0) - p).abs() <= 5 * (p * (1 - p) / visits).sqrt()).all()
    middle = white[:, 2] - white[:, 2].mean(0)
    scaled = middle / middle.std(0)
    pixels = (scaled.T @ scaled / visits).fill_diagonal_(0)
    assert pixels.abs().max() < 5.5 / math.sqrt(visits)  # 32,640 pairs
    following = (scaled[1:] * scaled[:-1]).mean(0)
    assert following.abs().max() < 5 / math.sqrt(visits)
    other = white[:, 0] - white[:, 0].mean(0)
    across = (scaled * other).mean(0) / other.std(0).clamp(min=1e-9)
    assert across[1:-1].abs().max() < 5 / math.sqrt(visits)


def test_a_code_always_shows_the_same_pixels() -> None:
    images = GREY.expand(7, 16, 16)
    every = rebinarised(images, codes(7, 5))
    assert torch.equal(rebinarised(images, torch.tensor([9, 30])), every[[9, 30]])
    assert not torch.equal(every[0], every[7])  # the same image at its next visit
    assert not torch.equal(every[0], every[1])


def test_what_is_no_image_or_no_code_is_refused() -> None:
    with pytest.raises(TypeError, match=r"bytes from 0 to 255, got images of torch.float32"):
        binarised(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="below 2\\^32, got 60000 and 0"):
        codes(60_000, 0)
