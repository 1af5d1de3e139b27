"""A run's folder on disk: one writer at a time, and files that are whole at every instant.

Every file is written beside its place, synced and renamed. A checkpoint is a numbered folder that appears by one
rename; the last two are kept, so a damaged newest one falls back to the one before.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bbvi_conv import interrupts

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, CHECKPOINTS, LOG, LOCK = "config.json", "checkpoint", "log.txt", ".lock"
_TENSORS, _META, _SUMS = "state.safetensors", "state.json", "SHA256SUMS"
_KEPT = 2


class RunDirectory:
    """A folder that holds one run; make it with :meth:`create` or :meth:`open`, and use it as a context manager.

    The writer holds a lock that the kernel releases when the process ends, however it ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @classmethod
    def create(cls, path: str | Path) -> RunDirectory:
        """A new run's folder, locked; files that belong to no run are left alone.

        Raises:
            ValueError: the folder holds a run already, another process writes it, or ``path`` is a file.
        """
        run = cls(Path(path))
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"{run.path} cannot be a run directory: a file is in the way; choose another") from error
        run.lock()
        if run.holds_run():
            run.close()
            raise ValueError(f"{run.path} already holds a run: choose another directory (--out), or resume this one")
        return run

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> RunDirectory:
        """An existing run's folder; ``write`` takes the lock.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds no run, or ``write`` is asked for and another process writes it.
        """
        run = cls(Path(path))
        if not run.path.exists():
            raise FileNotFoundError(f"no such run directory: {run.path}")
        if not run.holds_run():
            raise ValueError(f"{run.path} is no run directory: it holds neither {CONFIG} nor {CHECKPOINTS}/")
        if write:
            run.lock()
        return run

    def holds_run(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / CONFIG).is_file() or (self.path / CHECKPOINTS).is_dir()

    def lock(self) -> None:
        """Become the only writer; does nothing if this object is it already.

        Raises:
            ValueError: another writer holds the lock.
        """
        if self._lock is not None:
            return
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            who = f"process {owner}" if owner else "another process"
            raise ValueError(f"{self.path} is being written by {who}: wait for it to end, or stop it") from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._lock = handle

    def close(self) -> None:
        """Give the lock back."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.json."""
        self.write_json(CONFIG, config)

    def read_config(self) -> dict[str, Any]:
        """Read config.json.

        Raises:
            ValueError: it is missing or not a JSON object.
        """
        return self.read_json(CONFIG)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file in whole; a number that is not finite becomes null, since JSON has no other word for it."""
        self.write_text(name, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file that holds an object.

        Raises:
            ValueError: it is missing or not a JSON object.
        """
        path = self.path / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"{self.path} holds no {name}: the run ended before it was written") from error
        except ValueError as error:
            raise ValueError(f"{path} is not sound JSON ({error}): restore it from a copy") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path} holds no JSON object: restore it from a copy")
        return value

    def write_text(self, name: str, text: str) -> None:
        """Write a text file in whole or not at all."""
        partial = self.path / f".{name}.tmp"
        _write_synced(partial, text.encode())
        os.replace(partial, self.path / name)
        _sync_folder(self.path)

    def append_log(self, line: str) -> None:
        """Add a line with the time (UTC) to log.txt."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{now} {line.rstrip()}\n")

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to load, sound or not."""
        return bool(self._numbers())

    @interrupts.held()
    def save_checkpoint(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write tensors and plain data as one unit; a kill at any instant leaves this checkpoint or the one before.

        Ctrl-C is heard when it is written.

        Args:
            tensors: by name, of any device.
            meta: plain data; floats come back to the last bit, the non-finite ones too.
        """
        from safetensors.torch import save

        root = self.path / CHECKPOINTS
        root.mkdir(exist_ok=True)
        for left in root.glob("*.tmp"):
            shutil.rmtree(left)
        number = max(self._numbers(), default=0) + 1
        partial = root / f"{number:08d}.tmp"
        partial.mkdir()
        owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        contents = {_TENSORS: save(owned), _META: json.dumps(meta).encode()}
        sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items())
        for name, data in {**contents, _SUMS: sums.encode()}.items():
            _write_synced(partial / name, data)
        _sync_folder(partial)
        os.rename(partial, root / f"{number:08d}")
        _sync_folder(root)
        for old in self._numbers()[:-_KEPT]:
            shutil.rmtree(root / f"{old:08d}")

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (on the CPU) and plain data of the newest sound checkpoint.

        Raises:
            ValueError: there is no checkpoint, or none whose checksums are right.
        """
        from safetensors.torch import load

        damage = ""
        for number in reversed(self._numbers()):
            folder = self.path / CHECKPOINTS / f"{number:08d}"
            try:
                contents = _read_checked(folder)
            except (OSError, ValueError) as error:
                damage = damage or str(error)
                continue
            return load(contents[_TENSORS]), json.loads(contents[_META])
        if damage:
            raise ValueError(f"no sound checkpoint is left in {self.path} ({damage}): start the run again in a new one")
        raise ValueError(f"{self.path} holds no checkpoint: the run ended before its first; start it again")

    def _numbers(self) -> list[int]:
        """Numbers of the finished checkpoint folders, rising."""
        root = self.path / CHECKPOINTS
        return sorted(int(path.name) for path in root.iterdir() if path.name.isdigit()) if root.is_dir() else []


def _read_checked(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint, each with the checksum it was written with."""
    lines = (folder / _SUMS).read_text(encoding="ascii").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    contents = {}
    for name in (_TENSORS, _META):
        contents[name] = (folder / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != sums.get(name):
            raise ValueError(f"{folder / name} is truncated or damaged")
    return contents


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
