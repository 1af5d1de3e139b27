"""MNIST: the real files, and made-up ones with every kind of damage."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from bbvi_conv.data import mnist
from bbvi_conv.data.mnist import read_idx

needs_data = pytest.mark.skipif(
    "BBVI_CONV_DATA" not in os.environ, reason="BBVI_CONV_DATA names no folder of real data"
)


@needs_data
@pytest.mark.parametrize(
    ("split", "size", "zeros", "mean"), [("train", 60_000, 5_923, 0.1307), ("test", 10_000, 980, 0.1325)]
)
def test_mnist_is_the_published_one(split: str, size: int, zeros: int, mean: float) -> None:
    """Sizes, the number of zeros, and the mean intensity that MNIST tutorials normalise by, to its four digits."""
    images, labels = mnist(split)
    assert (images.shape, images.dtype) == ((size, 28, 28), torch.uint8)
    assert (labels.shape, labels.dtype) == ((size,), torch.int64)
    assert (images.min(), images.max(), labels.min(), labels.max()) == (0, 255, 0, 9)
    assert (labels == 0).sum() == zeros
    assert abs(images.double().mean() / 255 - mean) < 5e-5


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
        mnist("valid")


def test_a_file_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBVI_CONV_DATA", str(tmp_path))
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(idx(np.zeros((1, 28, 28), np.uint8))))
    with pytest.raises(ValueError, match="has the sha256"):
        mnist("test")


def idx(array: np.ndarray, *, code: int = 8, dimensions: int | None = None) -> bytes:
    header = bytes([0, 0, code, array.ndim if dimensions is None else dimensions])
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


ARRAY = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def test_idx_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx(ARRAY)))
    read = read_idx(path, dimensions=3)
    assert np.array_equal(read, ARRAY)
    assert read.flags.writeable  # torch.from_numpy warns of read-only arrays


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx(ARRAY, code=13)), "does not start as an IDX file"),
        (gzip.compress(idx(ARRAY, dimensions=2)), "does not start as an IDX file"),
        (gzip.compress(b"\x01" + idx(ARRAY)[1:]), "does not start as an IDX file"),
        (gzip.compress(idx(ARRAY)[:9]), "does not start as an IDX file"),
        (gzip.compress(b""), "does not start as an IDX file"),
        (gzip.compress(idx(ARRAY)[:-1]), "promises 24 bytes .* but holds 23"),
        (gzip.compress(idx(ARRAY) + b"!"), "holds 25"),
        (idx(ARRAY), "not a sound gzip file"),
        (gzip.compress(idx(ARRAY))[:-9], "not a sound gzip file"),
        (gzip.compress(idx(ARRAY))[:12] + bytes(6) + gzip.compress(idx(ARRAY))[18:], "not a sound gzip file"),
    ],
    ids=[
        "floats",
        "two dimensions",
        "no magic number",
        "half a header",
        "empty",
        "a byte short",
        "a byte long",
        "not gzipped",
        "cut off",
        "overwritten",
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path, dimensions=3)
