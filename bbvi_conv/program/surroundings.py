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


def _places(function: Any) -> tuple[list[_Place], list[Any]]:
    """Where a function finds tensors, and objects other than modules that hold some of them."""
    places: list[_Place] = []
    objects: list[Any] = []
    pending, seen = [function], set()
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, (Tensor, type, types.ModuleType)):
            continue
        seen.add(id(value))
        if isinstance(value, functools.partial):
            pending += [value.func, *tree_leaves((value.args, value.keywords))]
        elif isinstance(value, types.MethodType):
            pending += [value.__func__, value.__self__]
        elif isinstance(value, types.FunctionType):
            cells = [cell for cell in value.__closure__ or () if _is_filled(cell)]
            places += [_Place(cell) for cell in cells]
            pending += [leaf for cell in cells for leaf in tree_leaves(cell.cell_contents)]
            names = [name for name in _names(value.__code__) if name in value.__globals__]
            for name in names:
                known = value.__globals__[name]
                if isinstance(known, nn.Parameter):
                    places.append(_Place(value.__globals__, name))
                elif isinstance(known, nn.Module) or getattr(known, "__globals__", None) is value.__globals__:
                    pending.append(known)
        elif isinstance(value, nn.Module):
            owners = [held for owner in value.modules() for held in (owner._parameters, vars(owner))]
            places += [
                _Place(owner, name) for owner in owners for name, one in owner.items() if isinstance(one, Tensor)
            ]
        elif hasattr(value, "__dict__"):
            held = vars(value)
            objects.append(value)
            places += [_Place(held, name) for name, one in held.items() if isinstance(one, Tensor)]
            pending += [one for one in held.values() if isinstance(one, nn.Module)]
    places = [place for place in places if any(isinstance(leaf, Tensor) for leaf in tree_leaves(place.read()))]
    return places, objects


def numbers(*functions: Any) -> dict[tuple[int, str], Any]:
    """Numbers, truth values and texts around functions, by the object that holds them and their name.

    They are variables of the functions around them, of their file, and attributes of objects, modules and classes that
    they find there.
    """
    found: dict[tuple[int, str], Any] = {}
    pending, seen = list(functions), set()

    def note(owner: Any, held: Mapping[str, Any]) -> None:
        plain = {name: one for name, one in held.items() if isinstance(one, (int, float, str)) and one == one}
        found.update({(id(owner), name): one for name, one in plain.items()})

    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, (Tensor, types.ModuleType)):
            continue
        seen.add(id(value))
        if isinstance(value, functools.partial):
            pending += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            pending += [value.__func__, value.__self__]
        elif isinstance(value, types.FunctionType):
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            around = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
            known = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
            note(value, around)
            note(value.__globals__, known)
            own = [one for one in known.values() if getattr(one, "__module__", None) == value.__module__]
            pending += [*around.values(), *own]
        elif isinstance(value, nn.Module):
            for module in value.modules():
                note(module, vars(module))
        elif hasattr(value, "__dict__"):
            note(value, vars(value))
            pending += [one for one in vars(value).values() if isinstance(one, nn.Module)]
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
