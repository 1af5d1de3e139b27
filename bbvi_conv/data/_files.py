"""Where a data file is, and whether it is the file it should be.

A file is looked for under the folder that the environment variable ``BBVI_CONV_DATA`` names, then in the user's cache
folder (``$XDG_CACHE_HOME/bbvi_conv``, by default ``~/.cache/bbvi_conv``), and, where an address and a checksum are
known, downloaded into that cache once.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import stat
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

VARIABLE = "BBVI_CONV_DATA"
LARGEST = 256 * 2**20
"""Bytes that a member of an archive may have, where nothing else is said."""


def locate(relative: str, *, url: str | None = None, sha256: str | None = None) -> Path:
    """The local path of a data file, checked and, if need be, downloaded.

    Args:
        relative: path below the data folder, with forward slashes, such as ``"MNIST/raw/t10k-labels-idx1-ubyte.gz"``.
        url: where to download the file from if it is on neither place; None: it is never downloaded.
        sha256: the file's checksum in lower-case hexadecimal; needed for a download.
    Returns:
        A path whose file has the checksum, where one is given.
    Raises:
        FileNotFoundError: the file is nowhere and cannot be downloaded.
        ValueError: a file with another checksum, a path that leaves the data folder, or a ``url`` without ``sha256``.
    """
    if url is not None and sha256 is None:
        raise ValueError(f"{relative}: a download needs a sha256 to be checked against")
    if escapes(relative):
        raise ValueError(f"{relative!r} does not stay below the data folder; give a relative path without '..'")
    root = os.environ.get(VARIABLE)
    cached = cache_folder() / relative
    for path in ([Path(root).expanduser() / relative] if root else []) + [cached]:
        if path.is_file():
            return _checked(path, sha256)
    if url is not None and sha256 is not None:
        try:
            return _download(url, cached, sha256)
        except OSError as error:
            failure = f" and {url} could not be downloaded ({error})"
            raise FileNotFoundError(_nowhere(relative, root, cached) + failure + "; " + _way_out(relative)) from error
    raise FileNotFoundError(_nowhere(relative, root, cached) + "; " + _way_out(relative))


def cache_folder() -> Path:
    """The folder for downloads: ``$XDG_CACHE_HOME/bbvi_conv``, by default ``~/.cache/bbvi_conv``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "bbvi_conv"


def escapes(name: str) -> bool:
    r"""Whether a relative path or archive member would lie outside the folder it is put in.

    Example:
        >>> [escapes(name) for name in ("a/b.json", "../b.json", "/b.json", "a\\..\\..\\b.json", "C:b.json", "")]
        [False, True, True, True, True, True]
    """
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive whose members all lie inside their folder and are no links.

    Raises:
        ValueError: no sound zip archive, or an unsafe member.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if escapes(info.filename) or stat.S_ISLNK(info.external_attr >> 16):
                    raise ValueError(
                        f"{path} holds the unsafe member {info.filename!r}; get the archive from its source again"
                    )
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a sound zip archive ({error}); get it from its source again") from error


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, *, limit: int) -> bytes:
    """The content of one member; nothing is written to disk.

    Raises:
        ValueError: it unpacks to more than ``limit`` bytes.
    """
    with archive.open(info) as member:
        content = member.read(limit + 1)
    return _within(content, limit, path)


def read_single_member(path: Path, *, limit: int = LARGEST) -> bytes:
    """The content of the only file in a zip archive; nothing is written to disk.

    Args:
        path: the archive.
        limit: the most bytes the member may have when unpacked.
    Raises:
        ValueError: the file is no sound zip archive, holds another number of files than one, holds a member whose name
            leaves the folder or that is a link, or unpacks to more than ``limit`` bytes.
    """
    with open_zip(path) as archive:
        files = [info for info in archive.infolist() if not info.is_dir()]
        if len(files) != 1:
            raise ValueError(f"{path} holds {len(files)} files, expected one; get the archive from its source again")
        return read_member(archive, files[0], path, limit=limit)


def read_tar_member(path: Path, name: str, *, limit: int = LARGEST) -> bytes:
    """The content of a plain file in a gzipped tar archive, by its exact name; nothing is written to disk.

    Raises:
        ValueError: no sound archive, no plain file of that name, or more than ``limit`` bytes.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            info = next((member for member in archive if member.name == name), None)
            file = archive.extractfile(info) if info is not None and info.isreg() else None
            if file is None:
                raise ValueError(f"{path} has no plain file {name}; get the archive from its source again")
            content = file.read(limit + 1)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a sound tar.gz archive ({error}); get it from its source again") from error
    return _within(content, limit, path)


def read_arrays(path: Path, rows: Mapping[str, tuple[int, ...]]) -> list[npt.NDArray[Any]]:
    """Arrays of an npz file by name, all with as many rows; never unpickled.

    Args:
        path: the file.
        rows: name -> shape of one row; numbers alone are integers of any type, images bytes.
    Raises:
        ValueError: no sound npz file, a missing array, another shape or type, or different numbers of rows.
    """
    found: list[npt.NDArray[Any]] = []
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for name, shape in rows.items():
                if name not in arrays:
                    raise ValueError(f"it has no array {name!r}")
                array = arrays[name]
                wanted = array.dtype == np.uint8 if shape else np.issubdtype(array.dtype, np.integer)
                if array.shape[1:] != shape or array.ndim != len(shape) + 1 or not wanted:
                    raise ValueError(
                        f"its {name} is {array.dtype} {array.shape}, wanted (N, {', '.join(map(str, shape))})"
                    )
                found.append(array)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not the npz file it should be ({error}); get it again") from error
    if len({len(array) for array in found}) != 1:
        raise ValueError(f"{path} has {[len(array) for array in found]} rows in {', '.join(rows)}; get it again")
    return found


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Refuse an option that is not one of the choices.

    Raises:
        ValueError: naming the option and the choices.
    """
    if value not in choices:
        *most, last = (repr(choice) for choice in choices)
        raise ValueError(f"{name} must be {', '.join(most)}{' or ' * bool(most)}{last}, got {value!r}")


def _within(content: bytes, limit: int, path: Path) -> bytes:
    if len(content) > limit:
        raise ValueError(f"{path} unpacks to more than {limit} bytes; this is not the file it should be")
    return content


def _checked(path: Path, sha256: str | None) -> Path:
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(f"{path} has the sha256 {found}, expected {sha256}; remove the file and get it again")
    return path


def _download(url: str, target: Path, sha256: str) -> Path:
    """Fetch into a temporary file beside the target, renamed once its checksum is right: never half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=60) as response:
            shutil.copyfileobj(response, file)
        try:
            _checked(partial, sha256)
        except ValueError as error:
            raise ValueError(
                f"the download of {url} is not the expected file (sha256 {sha256}); try again later"
            ) from error
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _nowhere(relative: str, root: str | None, cached: Path) -> str:
    under = f"not under {VARIABLE}={root}" if root else f"{VARIABLE} is not set"
    return f"data file {relative} was not found: {under}, not in the cache ({cached})"


def _way_out(relative: str) -> str:
    return f"set {VARIABLE} to a folder that holds {relative}"
