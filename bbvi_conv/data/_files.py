"""Where a data file is, and whether it is the file it should be.

A file is looked for under the folder that the environment variable ``BBVI_CONV_DATA`` names, then in the user's cache
folder (``$XDG_CACHE_HOME/bbvi_conv``, by default ``~/.cache/bbvi_conv``), and, where an address and a checksum are
known, downloaded into that cache once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

VARIABLE = "BBVI_CONV_DATA"


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


def read_single_member(path: Path, *, limit: int = 256 * 2**20) -> bytes:
    """The content of the only file in a zip archive; nothing is written to disk.

    Args:
        path: the archive.
        limit: the most bytes the member may have when unpacked.
    Raises:
        ValueError: the file is no sound zip archive, holds another number of files than one, holds a member whose name
            leaves the folder or that is a link, or unpacks to more than ``limit`` bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if escapes(info.filename) or stat.S_ISLNK(info.external_attr >> 16):
                    raise ValueError(
                        f"{path} holds the unsafe member {info.filename!r}; get the archive from its source again"
                    )
            files = [info for info in archive.infolist() if not info.is_dir()]
            if len(files) != 1:
                raise ValueError(
                    f"{path} holds {len(files)} files, expected one; get the archive from its source again"
                )
            with archive.open(files[0]) as member:
                content = member.read(limit + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a sound zip archive ({error}); get it from its source again") from error
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
