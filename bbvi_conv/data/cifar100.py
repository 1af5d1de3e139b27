"""CIFAR-100: small colour photographs of 100 kinds of things."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bbvi_conv.data._files import check_choice, locate, read_arrays, read_tar_member

OFFICIAL = "cifar100/cifar-100-binary.tar.gz"
PART = "cifar100/cifar100_subset.npz"
URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
SHA256 = "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
RECORD = 2 + 3 * 32 * 32
"""Bytes of one image: coarse label, fine label, then its red, green and blue planes."""


def cifar100(
    split: Literal["train", "test"] = "train", *, source: Literal["official", "part"] = "official"
) -> tuple[Tensor, Tensor]:
    """Colour photographs with their fine labels.

    Args:
        split: ``"train"`` (50,000 images; of the part 12,000) or ``"test"`` (10,000; 3,000).
        source: ``"official"`` reads the official binary archive, ``cifar100/cifar-100-binary.tar.gz`` below
            ``BBVI_CONV_DATA``, else downloads it once (169 MB, checked) into the user's cache; ``"part"`` reads
            ``cifar100/cifar100_subset.npz``, 120 training and 30 test images of each class.
    Returns:
        Images, uint8 ``(N, 3, 32, 32)``; labels, int64 ``(N,)``, 0 to 99 in alphabetical order of the class.
    Raises:
        FileNotFoundError: the file is nowhere and cannot be downloaded.
        ValueError: another ``split`` or ``source``, or a damaged file.
    Source: Krizhevsky (2009), "Learning multiple layers of features from tiny images".
    """
    check_choice("split", split, ("train", "test"))
    check_choice("source", source, ("official", "part"))
    if source == "official":
        return read_binary(locate(OFFICIAL, url=URL, sha256=SHA256), split)
    path = locate(PART)
    pixels, labels = read_arrays(path, {f"x_{split}": (32, 32, 3), f"y_{split}": ()})
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(_checked(path, labels).astype(np.int64))


def read_binary(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images and fine labels of ``cifar-100-binary/SPLIT.bin`` in the official archive; nothing is written to disk.

    Raises:
        ValueError: no sound archive, no such member, or a length that is no number of records.
    """
    raw = read_tar_member(path, f"cifar-100-binary/{split}.bin")
    if not raw or len(raw) % RECORD:
        raise ValueError(f"{split}.bin in {path} holds {len(raw)} bytes, no number of records; get the archive again")
    records = np.frombuffer(raw, np.uint8).reshape(-1, RECORD)
    images = torch.from_numpy(records[:, 2:].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(_checked(path, records[:, 1]).astype(np.int64))


def _checked(path: Path, labels: np.ndarray) -> np.ndarray:
    if labels.size and int(labels.max()) > 99:
        raise ValueError(f"{path} has a label {int(labels.max())}, but there are 100 classes; get the file again")
    return labels
