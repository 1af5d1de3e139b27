"""OMNIGLOT at 28 x 28: handwritten characters of fifty alphabets."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bbvi_conv.data._files import check_choice, locate, read_arrays

FILE = "omniglot/omniglot28.npz"


def omniglot(split: Literal["train", "test"] = "train") -> tuple[Tensor, Tensor]:
    """Handwritten characters with their numbers.

    Read from ``omniglot/omniglot28.npz`` below ``BBVI_CONV_DATA``: the 105 x 105 originals by exact area averaging, and
    a random split of the same sizes as that of Burda et al. (2016). Neither is theirs, so published log-likelihoods are
    a rough guide only. There is no address for the file: it is never downloaded.

    Args:
        split: ``"train"`` (24,345 images) or ``"test"`` (8,070).
    Returns:
        Images, uint8 ``(N, 28, 28)``, 0 (paper) to 255 (ink); labels, int64 ``(N,)``, the character, 0 to 1622.
    Raises:
        FileNotFoundError: the file is nowhere.
        ValueError: another ``split``, or a damaged file.
    Source: Lake, Salakhutdinov and Tenenbaum (2015), "Human-level concept learning through probabilistic program
    induction".
    """
    check_choice("split", split, ("train", "test"))
    images, labels = read_arrays(locate(FILE), {f"x_{split}": (28, 28), f"y_{split}": ()})
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
