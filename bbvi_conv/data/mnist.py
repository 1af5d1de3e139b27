"""MNIST and Fashion-MNIST, each from its four original files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bbvi_conv.data._files import check_choice, locate


class _Set(NamedTuple):
    """Where four IDX files are: a folder below the data folder, a web address, and their checksums."""

    name: str
    folder: str
    url: str
    sha256: Mapping[str, str]


MNIST = _Set(
    "MNIST",
    "MNIST/raw",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    MappingProxyType(
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        }
    ),
)
FASHION = _Set(
    "Fashion-MNIST",
    "FashionMNIST/raw",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    MappingProxyType(
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        }
    ),
)
PREFIX = {"train": "train", "test": "t10k"}


def mnist(split: Literal["train", "test"] = "train") -> tuple[Tensor, Tensor]:
    """Handwritten digits with their labels.

    The files are read from ``MNIST/raw/`` below ``BBVI_CONV_DATA``, else from the user's cache, into which they are
    downloaded once (11 MB); their checksums are compared every time.

    Args:
        split: ``"train"`` (60,000 images) or ``"test"`` (10,000).
    Returns:
        Images, uint8 ``(N, 28, 28)``, 0 (paper) to 255 (ink); labels, int64 ``(N,)``, 0 to 9.
    Raises:
        FileNotFoundError: the files are nowhere and cannot be downloaded.
        ValueError: another ``split``, or a damaged file.
    Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
    """
    return _images_and_labels(MNIST, split)


def fashion_mnist(split: Literal["train", "test"] = "train") -> tuple[Tensor, Tensor]:
    """Articles of clothing, grey, with their labels; made to take the place of MNIST.

    As :func:`mnist`, from ``FashionMNIST/raw/`` (31 MB).

    Source: Xiao, Rasul and Vollgraf (2017), https://arxiv.org/abs/1708.07747
    """
    return _images_and_labels(FASHION, split)


def _images_and_labels(files: _Set, split: str) -> tuple[Tensor, Tensor]:
    check_choice("split", split, PREFIX)
    images = _read(files, f"{PREFIX[split]}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read(files, f"{PREFIX[split]}-labels-idx1-ubyte.gz", dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{files.name} {split} has {len(images)} images but {len(labels)} labels; get the files again")
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def read_idx(path: Path, *, dimensions: int) -> npt.NDArray[np.uint8]:
    """An array of bytes from a gzipped IDX file.

    The header is two zero bytes, the type code 0x08 (unsigned byte), the number of dimensions D, and D sizes as
    big-endian 32-bit integers; the rest is the array in row-major order.

    Args:
        path: the gzipped file.
        dimensions: D, the number of dimensions it must have.
    Returns:
        A writable uint8 array of the sizes in the header.
    Raises:
        ValueError: not gzip, another type or number of dimensions, or another length than the header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a sound gzip file ({error}); get it again") from error
    offset = 4 + 4 * dimensions
    if len(raw) < offset or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(
            f"{path} does not start as an IDX file of unsigned bytes in {dimensions} dimensions; get it again"
        )
    shape = struct.unpack(f">{dimensions}I", raw[4:offset])
    if len(raw) - offset != math.prod(shape):
        raise ValueError(
            f"{path} promises {math.prod(shape)} bytes {shape} but holds {len(raw) - offset}; get it again"
        )
    return np.frombuffer(raw, np.uint8, offset=offset).reshape(shape).copy()


def _read(files: _Set, name: str, *, dimensions: int) -> npt.NDArray[np.uint8]:
    path = locate(f"{files.folder}/{name}", url=files.url + name, sha256=files.sha256[name])
    return read_idx(path, dimensions=dimensions)
