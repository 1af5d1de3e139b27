"""Fashion-MNIST, CIFAR-100, OMNIGLOT and CelebA: real files where there are any, made-up ones with every damage."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bbvi_conv.data import celeba, cifar100, fashion_mnist, omniglot
from bbvi_conv.data import mnist as digits
from bbvi_conv.data.celeba import middle
from bbvi_conv.data.cifar100 import read_binary

needs_data = pytest.mark.skipif(
    "BBVI_CONV_DATA" not in os.environ, reason="BBVI_CONV_DATA names no folder of real data"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of our own, and no cache of the user's."""
    monkeypatch.setenv("BBVI_CONV_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# The real files


@needs_data
def test_the_parts_of_the_data_folder_are_what_they_say() -> None:
    images, labels = cifar100("test", source="part")
    assert (images.shape, images.dtype, labels.dtype) == ((3000, 3, 32, 32), torch.uint8, torch.int64)
    assert (torch.bincount(labels) == 30).all()  # thirty of each of the hundred classes
    images, labels = omniglot("test")
    assert (images.shape, labels.shape) == ((8070, 28, 28), (8070,))
    assert images[:, 0].float().mean() < 10 < images[:, 14].float().mean()  # ink on paper, and in the middle
    assert labels.max() < 1623


@needs_data
def test_faces_are_cropped_and_resized_as_the_array_file_says() -> None:
    """Two ways from the same photographs: JPEG files through pillow here, and an array made by its README's recipe."""
    faces, numbers = celeba("test", source="part", limit=100)
    ready, same = celeba("test", source="tiny")
    assert torch.equal(faces, ready)
    assert torch.equal(numbers, same)
    assert numbers[[0, -1]].tolist() == [9001, 9100]


# Fashion-MNIST


def test_fashion_mnist_is_read_like_mnist_and_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    content = {
        "t10k-images-idx3-ubyte.gz": gzip.compress(
            bytes([0, 0, 8, 3]) + struct.pack(">3I", *pixels.shape) + pixels.tobytes()
        ),
        "t10k-labels-idx1-ubyte.gz": gzip.compress(bytes([0, 0, 8, 1]) + struct.pack(">I", 2) + bytes([9, 3])),
    }
    for name, raw in content.items():
        put(folder, f"FashionMNIST/raw/{name}", raw)
    with pytest.raises(ValueError, match="expected 346e55b948d973a9"):
        fashion_mnist("test")
    monkeypatch.setattr(import_module("bbvi_conv.data.mnist"), "locate", lambda relative, **_: folder / relative)
    images, labels = fashion_mnist("test")
    assert np.array_equal(images.numpy(), pixels)
    assert labels.tolist() == [9, 3]
    with pytest.raises(FileNotFoundError, match="MNIST/raw"):
        digits("test")


# CIFAR-100


def cifar_archive(records: bytes, name: str = "cifar-100-binary/test.bin", kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/hosts"
        info.size = len(records) if kind == tarfile.REGTYPE else 0
        archive.addfile(info, io.BytesIO(records))
    return buffer.getvalue()


RECORD = bytes([4, 72]) + bytes([255] * 1024) + bytes([7] * 1024) + bytes(range(256)) * 4


def test_the_binary_archive_of_cifar_100(tmp_path: Path) -> None:
    images, labels = read_binary(put(tmp_path, "a", cifar_archive(RECORD + RECORD)), "test")
    assert labels.tolist() == [72, 72]  # the fine label, not the coarse one before it
    assert images.shape == (2, 3, 32, 32)
    assert images[0, 0].unique().tolist() == [255]
    assert images[0, 1].unique().tolist() == [7]
    assert images[0, 2, 1, :3].tolist() == [32, 33, 34]  # rows one after the other


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cifar_archive(RECORD[:-1]), "holds 3073 bytes, no number of records"),
        (cifar_archive(bytes([0, 100]) + RECORD[2:]), "label 100, but there are 100 classes"),
        (cifar_archive(RECORD, "cifar-100-binary/train.bin"), "no plain file cifar-100-binary/test.bin"),
        (cifar_archive(b"", kind=tarfile.SYMTYPE), "no plain file"),
        (cifar_archive(RECORD)[:40], "not a sound tar.gz archive"),
        (b"no archive", "not a sound tar.gz archive"),
    ],
    ids=["a byte short", "a wrong label", "another file", "a link", "cut off", "no archive"],
)
def test_a_damaged_archive_of_cifar_100_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_binary(put(tmp_path, "a", content), "test")


def test_the_official_archive_is_checked_before_it_is_read(folder: Path) -> None:
    put(folder, "cifar100/cifar-100-binary.tar.gz", cifar_archive(RECORD))
    with pytest.raises(ValueError, match="expected 58a81ae1"):
        cifar100("test")


# npz files


def arrays(**named: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **named)  # type: ignore[arg-type]
    return buffer.getvalue()


PIXELS, LABELS = np.zeros((4, 28, 28), np.uint8), np.arange(4, dtype=np.int16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (arrays(x_test=PIXELS), "it has no array 'y_test'"),
        (arrays(x_test=PIXELS.astype(float), y_test=LABELS), "its x_test is float64"),
        (arrays(x_test=PIXELS[:, :9], y_test=LABELS), r"its x_test is uint8 \(4, 9, 28\), wanted \(N, 28, 28\)"),
        (arrays(x_test=PIXELS, y_test=LABELS[:3]), r"\[4, 3\] rows"),
        (arrays(x_test=np.array([{}]), y_test=LABELS), "allow_pickle=False"),
        (arrays(x_test=PIXELS, y_test=LABELS)[:99], "not the npz file it should be"),
        (b"", "not the npz file it should be"),
    ],
    ids=["no labels", "floats", "too small", "rows", "pickled", "cut off", "empty"],
)
def test_a_damaged_npz_is_refused(folder: Path, content: bytes, message: str) -> None:
    put(folder, "omniglot/omniglot28.npz", content)
    with pytest.raises(ValueError, match=message):
        omniglot("test")


# CelebA


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (178, 218)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def faces(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_the_official_archive_of_faces_is_split_by_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": range(1, 3), "valid": range(3, 4), "test": range(4, 6)}
    monkeypatch.setattr(import_module("bbvi_conv.data.celeba"), "SPLITS", splits)
    content = {f"img_align_celeba/{i:06d}.jpg": jpeg((40 * i, 0, 0)) for i in range(5, 0, -1)}
    put(folder, "celeba/img_align_celeba.zip", faces(content))
    for split, numbers in splits.items():
        images, found = celeba(split, size=16)  # type: ignore[arg-type]
        assert found.tolist() == list(numbers)
        assert images.shape == (len(numbers), 3, 16, 16)
        assert (images[:, 0].float().mean((1, 2)) - 40.0 * found).abs().max() < 3  # red of 40 a number, JPEG's error
        assert images[:, 1:].max() < 4
    del content["img_align_celeba/000002.jpg"]
    put(folder, "celeba/img_align_celeba.zip", faces(content))
    with pytest.raises(ValueError, match=r"no member img_align_celeba/000002.jpg"):
        celeba("train")


def test_the_square_in_the_middle_is_kept() -> None:
    """148 of 178 x 218: a frame of another colour, 15 wide and 35 high, is cut off to the pixel; half size alike."""
    for width, height, left, top, side in ((178, 218, 15, 35, 148), (89, 109, 7, 17, 74)):
        face = Image.new("RGB", (width, height), (255, 0, 0))
        face.paste((0, 0, 255), (left, top, left + side, top + side))
        assert np.asarray(middle(face, side)).reshape(-1, 3).max(0).tolist() == [0, 0, 255]
        assert np.asarray(middle(face, side)).reshape(-1, 3).min(0).tolist() == [0, 0, 255]
    with pytest.raises(ValueError, match="got 218 x 178"):
        middle(Image.new("RGB", (218, 178)), 64)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"test/000001.jpg": jpeg((1, 2, 3))[:200]}, "no sound JPEG"),
        ({"test/000001.jpg": b"GIF89a"}, "no sound JPEG"),
        ({"test/cat.jpg": jpeg((1, 2, 3))}, "no NNNNNN.jpg"),
        ({"train/000001.jpg": jpeg((1, 2, 3))}, "has no images in test/"),
        ({"test/000001.jpg": b"\0" * (2**20 + 1)}, "unpacks to more than 1048576 bytes"),
        ({"test/000001.jpg": jpeg((1, 2, 3)), "../evil": b""}, "unsafe member '../evil'"),
        ({"test/000001.jpg": jpeg((1, 2, 3), (64, 64))}, "got 64 x 64"),
    ],
    ids=["cut off", "a GIF", "no number", "no such split", "too large", "unsafe", "not aligned"],
)
def test_a_damaged_archive_of_faces_is_refused(folder: Path, members: dict[str, bytes], message: str) -> None:
    put(folder, "celeba/celeba9k_89x109.zip", faces(members))
    with pytest.raises(ValueError, match=message):
        celeba("test", source="part")


def test_options_that_do_not_exist_are_refused(folder: Path) -> None:
    for load in (fashion_mnist, cifar100, omniglot, celeba):
        with pytest.raises(ValueError, match=r"split must be 'train'.* got 'dev'"):
            load("dev")  # type: ignore[operator]
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
        celeba("valid", source="part")
    with pytest.raises(ValueError, match="source must be 'official' or 'part', got 'all'"):
        cifar100(source="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="64 x 64 only, got size=32"):
        celeba("test", source="tiny", size=32)
    with pytest.raises(FileNotFoundError, match="set BBVI_CONV_DATA to a folder that holds celeba/img_align_celeba"):
        celeba()
