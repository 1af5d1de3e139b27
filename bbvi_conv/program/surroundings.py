"""What a function uses besides its arguments: tensors, and others in their place for a while; and plain numbers."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class _Place(NamedTuple):
    """Where a function finds a value: a variable of a function around it, or an entry of a dict."""

    owner: types.CellType | MutableMapping[str, Any]
    name: str = ""

    def read(self) -> Any:
        return self.owner.cell_contents if isinstance(self.owner, types.CellType) else self.owner[self.name]

    def write(self, value: Any) -> None:
        if isinstance(self.owner, types.CellType):
            self.owner.cell_contents = value
        else:
            self.owner[self.name] = value


def surroundings(
    function: Callable[..., Any],
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], AbstractContextManager[None]]]:
    """Tensors around a function, and a context manager in which it finds others in their place, in their order.

    They are those in variables of the functions around it and around those that it calls, attributes of objects that it
    finds there, and attributes and parameters of modules; of the variables of its file, modules and parameters.
    """
    places, objects = _places(function)
    found: dict[int, Tensor] = {}
    for place in places:
        for leaf in tree_leaves(place.read()):
            if isinstance(leaf, Tensor):
                found.setdefault(id(leaf), leaf)
    order = {key: number for number, key in enumerate(found)}

    @contextmanager
    def others(given: Sequence[Tensor]) -> Iterator[None]:
        def new(leaf: Any) -> Any:
            return given[order[id(leaf)]] if id(leaf) in order else leaf

        before = [(place, place.read()) for place in places]
        attributes = [(vars(value), dict(vars(value))) for value in objects]
        try:
            for place, value in before:
                place.write(tree_map(new, value))
            yield
        finally:
            for place, value in before:
                place.write(value)
            for held, kept in attributes:  # without what an object has noted meanwhile
                held.clear()
                held.update(kept)

    return list(found.values()), others


def _walk(functions: Sequence[Any], own: Callable[[Any, types.FunctionType], bool]) -> Iterator[Any]:
    """Functions, modules and other objects that functions find, each once: in variables around them, in their file.

    Of the variables of its file a function is followed to those that are its ``own``.
    """
    pending, seen = list(functions), set()
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, (Tensor, types.ModuleType)):
            continue
        seen.add(id(value))
        if isinstance(value, functools.partial):
            pending += [value.func, *tree_leaves((value.args, value.keywords))]
        elif isinstance(value, types.MethodType):
            pending += [value.__func__, value.__self__]
        elif isinstance(value, types.FunctionType):
            pending += [leaf for cell in _cells(value).values() for leaf in tree_leaves(cell.cell_contents)]
            pending += [one for one in _known(value).values() if own(one, value)]
            yield value
        elif hasattr(value, "__dict__"):
            if not isinstance(value, nn.Module):
                pending += [one for one in vars(value).values() if isinstance(one, nn.Module)]
            yield value


def _cells(function: types.FunctionType) -> dict[str, types.CellType]:
    """Variables around a function that have a value."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell for name, cell in cells if _is_filled(cell)}


def _known(function: types.FunctionType) -> dict[str, Any]:
    """Variables of its file that a function names."""
    held = function.__globals__
    return {name: held[name] for name in _names(function.__code__) if name in held}


def _places(function: Any) -> tuple[list[_Place], list[Any]]:
    """Where a function finds tensors, and objects other than modules that hold some of them."""
    places: list[_Place] = []
    objects: list[Any] = []

    def own(value: Any, by: types.FunctionType) -> bool:
        return isinstance(value, nn.Module) or getattr(value, "__globals__", None) is by.__globals__

    for value in _walk([function], own):
        if isinstance(value, types.FunctionType):
            places += [_Place(cell) for cell in _cells(value).values()]
            named = _known(value).items()
            places += [_Place(value.__globals__, name) for name, one in named if isinstance(one, nn.Parameter)]
        elif isinstance(value, nn.Module):
            owners = [held for owner in value.modules() for held in (owner._parameters, vars(owner))]
            places += [
                _Place(owner, name) for owner in owners for name, one in owner.items() if isinstance(one, Tensor)
            ]
        elif not isinstance(value, type):
            held = vars(value)
            objects.append(value)
            places += [_Place(held, name) for name, one in held.items() if isinstance(one, Tensor)]
    places = [place for place in places if any(isinstance(leaf, Tensor) for leaf in tree_leaves(place.read()))]
    return places, objects


def numbers(*functions: Any) -> dict[tuple[int, str], Any]:
    """Numbers, truth values and texts around functions, by the object that holds them and their name.

    They are variables of the functions around them, of their file, and attributes of objects, modules and classes that
    they find there.
    """
    found: dict[tuple[int, str], Any] = {}

    def note(owner: Any, held: Mapping[str, Any]) -> None:
        plain = {name: one for name, one in held.items() if isinstance(one, (int, float, str)) and one == one}
        found.update({(id(owner), name): one for name, one in plain.items()})

    def own(value: Any, by: types.FunctionType) -> bool:
        return getattr(value, "__module__", None) == by.__module__

    for value in _walk(functions, own):
        if isinstance(value, types.FunctionType):
            note(value, {name: cell.cell_contents for name, cell in _cells(value).items()})
            note(value.__globals__, _known(value))
        else:
            for owner in value.modules() if isinstance(value, nn.Module) else (value,):
                note(owner, vars(owner))
    return found


def changed(before: Mapping[tuple[int, str], Any], after: Mapping[tuple[int, str], Any]) -> list[str]:
    """Names of what :func:`numbers` gave twice and differs."""
    return sorted({key[1] for key, value in after.items() if before.get(key, value) != value})


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _names(code: types.CodeType) -> list[str]:
    """Names that code and the functions inside it look up outside."""
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return [*code.co_names, *(name for part in inner for name in _names(part))]


__all__ = ["changed", "numbers", "surroundings"]
