"""Model files, shipped or a user's own: Python files that hold ``model`` and ``data()``, and maybe ``guide``,
``held_out()`` and ``fit``.

A file is run by its path under a private module name, so a folder called ``models`` never becomes a package. It is
code: run only files you trust.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class ModelFile:
    """What a model file holds, ready for :func:`bbvi_conv.fit`.

    Attributes:
        path: the file, absolute.
        name: the NAME of ``FILE:NAME``; None: the file's ``model``.
        model, guide: the Pyro model and its own guide, or None where a family is to make one.
        args, kwargs: what ``data()`` returned.
        defaults: the file's ``fit`` dict, keyword arguments of :func:`bbvi_conv.fit`.
        seed: the seed under which the file and its ``data()`` were run.
        held_out: what ``held_out()`` returned, positional arguments over held-out rows; None where it was not asked for
            or the file has none.
    """

    path: Path
    name: str | None
    model: Callable[..., Any]
    guide: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    held_out: tuple[Any, ...] | None = None


def load_model(spec: str, *, seed: int | None = None, held_out: bool = False) -> ModelFile:
    """Run the file of ``FILE[:NAME]`` and take what it holds.

    ``FILE`` is a path, or the name of a shipped model such as ``eight_schools``. ``NAME`` picks another model of the
    file; its guide is then ``NAME_guide``, if there is one.

    Args:
        spec: ``FILE[:NAME]``.
        seed: for networks made at load and for random data; None: the ``seed`` of the file's ``fit`` dict, else 0. The
            generators of torch, numpy and Python are left as found.
        held_out: run ``held_out()`` too, where the file has one.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file fails, or lacks ``model``, ``NAME`` or ``data()``, or ``data()`` or ``held_out()`` fails.
    """
    path, name = locate_model(spec)
    module = _run(path, 0 if seed is None else seed)
    defaults = _defaults(path, module)
    if seed is None:
        seed = defaults.get("seed", 0)
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"{path}: the seed in its fit dict must be an integer of at least 0, got {seed!r}")
        if seed != 0:
            module = _run(path, seed)
            defaults = _defaults(path, module)
    model, guide = _programs(path, module, name)
    args, kwargs = _data(path, module, seed)
    unseen = _held_out(path, module, seed) if held_out else None
    return ModelFile(path, name, model, guide, args, kwargs, defaults, seed, unseen)


def load_programs(path: str, name: str | None, *, seed: int) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """Model and guide of a file run once more under a seed: with new networks, and without its data.

    Raises:
        ValueError: as for :func:`load_model`.
    """
    where = Path(path)
    key = _private_name(where)
    before = sys.modules.get(key)
    try:
        return _programs(where, _run(where, seed), name)
    finally:
        if before is not None:
            sys.modules[key] = before


def load_module(spec: str, *, seed: int = 0) -> ModuleType:
    """The file of ``FILE`` run as a module, for what it holds besides: closed forms, constants, other models.

    Its networks are new ones at every call, started under ``seed``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file fails.
    """
    return _run(locate_model(spec)[0], seed)


def locate_model(spec: str) -> tuple[Path, str | None]:
    """The absolute path and the NAME of ``FILE[:NAME]``, for a file or a shipped model; nothing is run.

    Raises:
        FileNotFoundError: there is no such file and no shipped model of that name.
        ValueError: a folder is given.
    """
    head, colon, tail = spec.rpartition(":")
    file, name = (head, tail) if colon and head and tail.isidentifier() and not Path(spec).exists() else (spec, None)
    path = Path(file).expanduser()
    if path.is_file():
        return path.resolve(), name
    if file.isidentifier() and (models_folder() / f"{file}.py").is_file():
        return (models_folder() / f"{file}.py").resolve(), name
    if path.is_dir():
        raise ValueError(f"{file!r} is a folder, not a model file: name a .py file in it")
    raise FileNotFoundError(f"no such model file {file!r}: give a path or a shipped model ({', '.join(_names())})")


def shipped() -> list[tuple[str, str]]:
    """Names of the shipped models and the first line of their docstrings; nothing is run."""
    listed = []
    for name in _names():
        tree = ast.parse((models_folder() / f"{name}.py").read_text(encoding="utf-8"))
        listed.append((name, (ast.get_docstring(tree) or "").partition("\n")[0]))
    return listed


def models_folder() -> Path:
    """Where the shipped models are: in the package where a wheel was installed, beside it in a checkout."""
    packaged = _PACKAGE / "_models"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "models"


def line_of(error: BaseException, path: Path) -> int | None:
    """The line of the file ``path`` that the error came through last; None where it did not."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else None


def _names() -> list[str]:
    return sorted(path.stem for path in models_folder().glob("*.py") if not path.stem.startswith("_"))


def _private_name(path: Path) -> str:
    return f"_bbvi_conv_model_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _run(path: Path, seed: int) -> ModuleType:
    """Execute the file. It is kept in ``sys.modules`` under its private name, which dataclasses and pickles need."""
    module = ModuleType(_private_name(path))
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    with _reported(path, "running the file"), _seeded(seed), _beside(path):
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    return module


def _programs(path: Path, module: ModuleType, name: str | None) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """The model and its guide."""
    model = getattr(module, name or "model", None)
    if not callable(model):
        own = [key for key, value in vars(module).items() if _is_own_function(module, key, value)]
        there = f"it defines {', '.join(own)}" if own else "it defines no functions"
        if name is None:
            raise ValueError(f"{path} has no `model`; {there}: define `model`, or pick one with FILE:NAME")
        raise ValueError(f"{path} has no model {name!r}; {there}")
    guide = getattr(module, "guide" if name in (None, "model") else f"{name}_guide", None)
    if guide is not None and not callable(guide):
        raise ValueError(f"{path}: its guide is no function but {type(guide).__name__}; make it a Pyro guide")
    return model, guide


def _is_own_function(module: ModuleType, key: str, value: Any) -> bool:
    own = getattr(value, "__module__", None) == module.__name__ and not key.startswith("_")
    return own and callable(value) and not isinstance(value, type) and key not in ("data", "held_out")


def _data(path: Path, module: ModuleType, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``data()`` returns, as positional and keyword arguments."""
    function = getattr(module, "data", None)
    if not callable(function):
        raise ValueError(f"{path} has no `data()`: define it to return the tuple of the model's positional arguments")
    with _reported(path, "its data()"), _seeded(seed), _beside(path):
        found = function()
    if isinstance(found, tuple):
        return found, {}
    if isinstance(found, dict) and all(isinstance(key, str) for key in found):
        return (), found
    raise ValueError(
        f"{path}: its data() returned {type(found).__name__}, not the tuple of positional arguments or a dict of "
        "keyword arguments; a single argument x is returned as `(x,)`"
    )


def _held_out(path: Path, module: ModuleType, seed: int) -> tuple[Any, ...] | None:
    """What ``held_out()`` returns; None where there is none."""
    function = getattr(module, "held_out", None)
    if function is None:
        return None
    if not callable(function):
        raise ValueError(f"{path}: its held_out is no function but {type(function).__name__}; rename it")
    with _reported(path, "its held_out()"), _seeded(seed), _beside(path):
        found = function()
    if isinstance(found, tuple):
        return found
    raise ValueError(
        f"{path}: its held_out() returned {type(found).__name__}, not the tuple of positional arguments of the model "
        "over held-out rows; a single argument x is returned as `(x,)`"
    )


def _defaults(path: Path, module: ModuleType) -> dict[str, Any]:
    found = getattr(module, "fit", {})
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: `fit` must be a dict of keyword arguments of bbvi_conv.fit, got {type(found).__name__}; "
            "rename it if it is something else"
        )
    return dict(found)


@contextmanager
def _reported(path: Path, what: str) -> Iterator[None]:
    """Turn any failure of the user's code into one sentence with the line; the cause stays attached."""
    try:
        yield
    except (Exception, SystemExit) as error:
        line = error.lineno if isinstance(error, SyntaxError) else line_of(error, path)
        place = f"{path}, line {line}" if line is not None else str(path)
        message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
        raise ValueError(f"{place}: {what} failed with {type(error).__name__}: {message}") from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators of torch (CPU), numpy and Python, and put them back as found."""
    import torch

    from bbvi_conv.program.noise import beside_torch

    with beside_torch(seed), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Let the file import its neighbours, after everything that is installed."""
    folder = str(path.parent)
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)
