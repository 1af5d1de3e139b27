"""Compile a plan to a shared library, once for all processes."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bbvi_conv.engine.native import cache, codec
from bbvi_conv.engine.native.plan import Plan
from bbvi_conv.engine.native.source import text

FORMAT = "27"
"""Changes with the layout of a cache entry or with the generated code."""

_LIBRARY, _PLAN, _LOST = "step.so", "plan.json", ".lost"


class NoCompiler(RuntimeError):
    """There is no C++ compiler, or it failed; the reason is the message."""


def compiler() -> str:
    """Path of the C++ compiler: ``$CXX``, else g++, else clang++.

    Raises:
        NoCompiler: if there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NoCompiler("there is no C++ compiler (g++ or clang++ on PATH, or CXX)")


def _flags(contracted: bool) -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    known = capability in ("AVX512", "AVX2")
    root = Path(torch.__file__).parent
    return [
        *("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-w", "-DNDEBUG"),
        *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
        f"-ffp-contract={'fast' if contracted else 'off'}",
        f"-DCPU_CAPABILITY={capability if known else 'DEFAULT'}",
        *([f"-DCPU_CAPABILITY_{capability}"] if known else []),
        *("-I", str(root / "include"), "-I", str(root / "include" / "torch" / "csrc" / "api" / "include")),
    ]


def _link() -> list[str]:
    root = Path(torch.__file__).parent / "lib"
    return ["-L", str(root), f"-Wl,-rpath,{root}", "-ltorch_cpu", "-lc10"]


def processor() -> str:
    """What ``-march=native`` and the choice of operations depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(os.uname())
    wanted = ("vendor_id", "model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in wanted}))


def name_of(description: str, version: str, *, contracted: bool) -> str:
    """Name of the cache entry of a graph; ``contracted``: a product and a sum may be one operation with one rounding.

    Raises:
        NoCompiler: if there is no compiler to name.
    """
    path = compiler()
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return cache.key(FORMAT, description, version, torch.__version__, shown, " ".join(_flags(contracted)), processor())


def is_cached(name: str) -> bool:
    """Whether an entry of that name lies in the cache."""
    try:
        return (cache.folder() / name / _PLAN).exists()
    except cache.UnsafeCache:
        return False


def lost(name: str, more: float) -> float:
    """Seconds that runs have lost for want of an entry of that name, these and ``more``; kept beside the entries."""
    try:
        path = cache.folder() / f"{name}{_LOST}"
        total = more + (float(path.read_text()) if path.exists() else 0.0)
        path.write_text(str(total))
    except (cache.UnsafeCache, OSError, ValueError):
        return more
    return total


def library(name: str, plans: Callable[[], Iterator[Plan]], *, contracted: bool) -> tuple[ctypes.CDLL, Plan, bool]:
    """The library of that name, from the cache or made now; its plan; and whether it was made now.

    It is made from the first of ``plans`` whose text the compiler takes. A damaged entry is made anew. A cache folder
    that others could write to is not used, with a warning.

    Raises:
        NoCompiler: if the compiler fails.
    """
    try:
        root = cache.folder()
    except cache.UnsafeCache as error:
        warnings.warn(f"{error}; until then compiled code is not kept", stacklevel=2)
        with TemporaryDirectory(prefix="bbvi_conv-") as gone:  # what has been loaded from it stays loaded
            return _library(Path(gone), name, plans, contracted=contracted)
    return _library(root, name, plans, contracted=contracted)


def _library(
    root: Path, name: str, plans: Callable[[], Iterator[Plan]], *, contracted: bool
) -> tuple[ctypes.CDLL, Plan, bool]:
    found = _load(root / name)
    if found is not None:
        return *found, False
    refused: NoCompiler | None = None
    for plan in plans():
        try:
            with cache.entry(root, name) as new:
                _build(text(plan), new, _flags(contracted))
                record = {**codec.encode(plan), "sha256": cache.digest(new / _LIBRARY)}
                (new / _PLAN).write_text(json.dumps(record))
            break
        except NoCompiler as error:
            refused = refused or error
    else:
        raise refused or NoCompiler("there is nothing to compile")
    (root / f"{name}{_LOST}").unlink(missing_ok=True)
    found = _load(root / name)
    if found is None:
        raise NoCompiler(f"the compiled library in {root / name} cannot be loaded")
    return *found, True


def _build(source: str, where: Path, flags: list[str]) -> None:
    (where / "step.cpp").write_text(source)
    command = [compiler(), *flags, "-o", str(where / _LIBRARY), str(where / "step.cpp"), *_link()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:300])
        raise NoCompiler(f"{command[0]} failed on the generated code: {first}")


def _load(where: Path) -> tuple[ctypes.CDLL, Plan] | None:
    """The entry, or None where there is none or it is damaged."""
    try:
        record = json.loads((where / _PLAN).read_text())
        if cache.digest(where / _LIBRARY) != record["sha256"]:
            return None
        loaded = ctypes.CDLL(str(where / _LIBRARY))
        loaded.advance.restype = ctypes.c_int64
        return loaded, codec.decode(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
