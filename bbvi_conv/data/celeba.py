"""CelebA: aligned faces, cropped and resized as they are read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from bbvi_conv.data._files import check_choice, locate, open_zip, read_arrays, read_member

if TYPE_CHECKING:
    from PIL.Image import Image

OFFICIAL, PART, TINY = "celeba/img_align_celeba.zip", "celeba/celeba9k_89x109.zip", "celeba/celeba64_tiny.npz"
WIDTH, HEIGHT, CROP = 178, 218, 148
"""Of an aligned image, and the side of the square in its middle that is kept; smaller copies in proportion."""
SPLITS = {"train": range(1, 162_771), "valid": range(162_771, 182_638), "test": range(182_638, 202_600)}
"""Numbers of the images in the official split."""
LARGEST = 2**20
"""Bytes that one JPEG file may have."""


def celeba(
    split: Literal["train", "valid", "test"] = "train",
    *,
    size: int = 64,
    source: Literal["official", "part", "tiny"] = "official",
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Faces with their numbers: the square in the middle (148 x 148 at full size), resized.

    The data are for non-commercial research only and have no address that can be fetched without a browser: put a file
    below ``BBVI_CONV_DATA``.

    Args:
        split: ``"train"``, ``"valid"`` or ``"test"``; the part and the tiny one have no ``"valid"``.
        size: height and width of the result.
        source: ``"official"`` reads ``celeba/img_align_celeba.zip`` with the official split (162,770, 19,867 and 19,962
            images); ``"part"`` reads ``celeba/celeba9k_89x109.zip``, images 1 to 8,000 and 9,001 to 10,000 at half
            size; ``"tiny"`` reads ``celeba/celeba64_tiny.npz``, the first 500 and 100 of those at 64 x 64.
        limit: read only the first so many.
    Returns:
        Images, uint8 ``(N, 3, size, size)``; numbers, int64 ``(N,)``, of the files, from 1.
    Raises:
        FileNotFoundError: the file is nowhere.
        ValueError: another ``split``, ``source`` or ``size``, or a damaged file.
    Source: Liu et al. (2015), "Deep learning face attributes in the wild", https://arxiv.org/abs/1411.7766
    """
    check_choice("source", source, ("official", "part", "tiny"))
    check_choice("split", split, SPLITS if source == "official" else ("train", "test"))
    if size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"size and limit must be at least 1, got {size} and {limit}")
    if source == "tiny":
        return _tiny(split, size, limit)
    path = locate(OFFICIAL if source == "official" else PART)
    with open_zip(path) as archive:
        members = official_members(archive, path, split) if source == "official" else part_members(archive, path, split)
        members = members[:limit]
        images = torch.empty(len(members), 3, size, size, dtype=torch.uint8)
        for i, face in enumerate(_faces(archive, path, members)):
            images[i] = torch.from_numpy(np.array(middle(face, size))).permute(2, 0, 1)
    return images, torch.tensor([_number(info) for info in members])


def official_members(archive: zipfile.ZipFile, path: Path, split: str) -> list[zipfile.ZipInfo]:
    """Members ``img_align_celeba/NNNNNN.jpg`` of the split, in order of their numbers.

    Raises:
        ValueError: one is missing.
    """
    known = {info.filename: info for info in archive.infolist()}
    names = [f"img_align_celeba/{number:06d}.jpg" for number in SPLITS[split]]
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise ValueError(f"{path} has no member {missing}, which the official archive has; get it again")
    return [known[name] for name in names]


def part_members(archive: zipfile.ZipFile, path: Path, split: str) -> list[zipfile.ZipInfo]:
    """Members ``SPLIT/NNNNNN.jpg``, in order of their numbers.

    Raises:
        ValueError: there are none, or one has no number.
    """
    found = [info for info in archive.infolist() if not info.is_dir() and info.filename.startswith(f"{split}/")]
    odd = next((info for info in found if not PurePosixPath(info.filename).stem.isdecimal()), None)
    if not found or odd is not None:
        what = "has no images" if odd is None else f"has the member {odd.filename!r}, which is no NNNNNN.jpg,"
        raise ValueError(f"{path} {what} in {split}/; get the archive again")
    return sorted(found, key=_number)


def middle(face: Image, size: int) -> Image:
    """The square in the middle, 148/178 of the width, at ``size`` x ``size`` by bicubic interpolation.

    Raises:
        ValueError: an image that is not upright in the proportions of CelebA.
    """
    from PIL import Image

    width, height = face.size
    side = round(width * CROP / WIDTH)
    if not side <= height or abs(height / width - HEIGHT / WIDTH) > 0.02:
        raise ValueError(f"an aligned face is {WIDTH} x {HEIGHT} or smaller in proportion, got {width} x {height}")
    left, top = (width - side) // 2, (height - side) // 2
    return face.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


def _faces(archive: zipfile.ZipFile, path: Path, members: list[zipfile.ZipInfo]) -> Iterator[Image]:
    from PIL import Image, UnidentifiedImageError

    for info in members:
        raw = read_member(archive, info, path, limit=LARGEST)
        try:
            with Image.open(io.BytesIO(raw), formats=["JPEG"]) as face:
                yield face.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{info.filename} in {path} is no sound JPEG file ({error}); get it again") from error


def _number(info: zipfile.ZipInfo) -> int:
    return int(PurePosixPath(info.filename).stem)


def _tiny(split: str, size: int, limit: int | None) -> tuple[Tensor, Tensor]:
    if size != 64:
        raise ValueError(f'the tiny file holds images of 64 x 64 only, got size={size}; use source="part"')
    (pixels,) = read_arrays(locate(TINY), {f"x_{split}": (64, 64, 3)})
    images = torch.from_numpy(pixels[:limit]).permute(0, 3, 1, 2).contiguous()
    first = 1 if split == "train" else 9001
    return images, torch.arange(first, first + len(images))
