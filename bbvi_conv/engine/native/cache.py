"""A private folder of compiled code: what is loaded from it runs, so nobody else may write there."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


class UnsafeCache(RuntimeError):
    """The cache folder could be written by somebody else; the message says what to do."""


def folder() -> Path:
    """``$BBVI_CONV_CACHE``, else ``bbvi_conv`` in the user's cache folder; made with mode 0700.

    Raises:
        UnsafeCache: if it belongs to another user, or others may read or write it.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("BBVI_CONV_CACHE") or Path(base) / "bbvi_conv")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise UnsafeCache(f"the cache folder {path} cannot be made ({error.strerror}); set BBVI_CONV_CACHE") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise UnsafeCache(
            f"the cache folder {path} is not a folder of yours alone: run chmod 700 {path}, or set BBVI_CONV_CACHE"
        )
    return path


def key(*parts: str) -> str:
    """Name of an entry: a digest of everything the compiled code depends on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        digest.update(part.encode())
    return digest.hexdigest()[:40]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def entry(root: Path, name: str) -> Iterator[Path]:
    """A new folder that becomes ``root/name`` at the end, whole or not at all; an entry of that name is replaced."""
    with TemporaryDirectory(dir=root, prefix=".new-", ignore_cleanup_errors=True) as made:
        new = Path(made) / name
        new.mkdir(mode=0o700)
        yield new
        old = Path(made) / "old"
        target = root / name
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:  # another process was first: its entry is as good
            if not target.exists():
                raise
