"""What a fit is asked for, as JSON and back: families, objectives, optimisers, step sizes, minibatches, float types.

A frozen dataclass becomes ``{"class": NAME, field: value, ...}`` and comes back only if ``NAME`` is one of
:func:`known_classes`: nothing is imported or evaluated on the word of a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

_TAGS = ("class", "dtype", "device", "tuple", "float", "function")


def known_classes() -> dict[str, type]:
    """The classes that :func:`decode` makes, by name."""
    from bbvi_conv import objectives, optim
    from bbvi_conv.families import FAMILIES, SCALE_MAPS
    from bbvi_conv.monitor.strata import Strata
    from bbvi_conv.networks.encoders import ENCODERS
    from bbvi_conv.objectives import OBJECTIVES
    from bbvi_conv.program.minibatch import Minibatch

    classes: list[Callable[..., Any]] = [
        *FAMILIES.values(),
        *SCALE_MAPS.values(),
        *ENCODERS.values(),
        *OBJECTIVES.values(),
        objectives.GrowingParticles,
        objectives.LinearWarmup,
        objectives.Pair,
        optim.SGD,
        optim.Adam,
        optim.Constant,
        optim.InverseSqrt,
        optim.InverseLinear,
        optim.ExponentialDecay,
        optim.CosineDecay,
        optim.Projected,
        optim.ProximalSGD,
        optim.Ball,
        optim.ScaleFloor,
        Minibatch,
        Strata,
    ]
    return {cls.__name__: cls for cls in classes if isinstance(cls, type)}


def encode(value: Any) -> Any:
    """The value as plain JSON data; :func:`decode` gives it back equal.

    A function of the user's own (a family, a step size) is written down by its name only, for the reader: loading asks
    for it as an argument.

    Raises:
        TypeError: a value that has no place in a settings file, by its type.
    """
    import torch

    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        bad = [key for key in value if not isinstance(key, str) or key in _TAGS]
        if bad:
            raise TypeError(f"a settings dict cannot hold the key {bad[0]!r}: use another string")
        return {key: encode(item) for key, item in value.items()}
    if known_classes().get(type(value).__name__) is type(value) and is_dataclass(value):
        return {"class": type(value).__name__} | {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return {"function": f"{named.__module__}:{named.__qualname__}"}
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written to a settings file")


def decode(data: Any, *, name: str = "setting") -> Any:
    """The value that :func:`encode` wrote.

    Args:
        data: parsed JSON.
        name: what the value is called in an error.
    Raises:
        ValueError: an unknown class, a function of the user's own, fields that do not fit their class, or anything that
            :func:`encode` does not write.
    """
    if isinstance(data, list):
        return [decode(item, name=name) for item in data]
    if not isinstance(data, dict):
        return data
    tag = next((key for key in data if key in _TAGS), None)
    if tag is None:
        return {key: decode(item, name=key) for key, item in data.items()}
    if tag == "class":
        return _instance(data, name)
    if len(data) != 1:
        raise ValueError(f"{name} holds {tag!r} beside other keys: the settings file was not written by this version")
    return _tagged(tag, data[tag], name)


def _instance(data: dict[str, Any], name: str) -> Any:
    classes, wanted = known_classes(), data["class"]
    if wanted not in classes:
        raise ValueError(
            f"{name} is of the unknown class {wanted!r}: use the version of bbvi_conv that wrote it, or give {name} as "
            f"an argument (known are {', '.join(classes)})"
        )
    cls = classes[wanted]
    values = {key: decode(item, name=key) for key, item in data.items() if key != "class"}
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{name} does not fit the class {wanted}: {error}; give {name} as an argument") from error


def _tagged(tag: str, content: Any, name: str) -> Any:
    import torch

    if tag == "tuple" and isinstance(content, list):
        return tuple(decode(item, name=name) for item in content)
    if tag == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if tag == "function":
        raise ValueError(f"{name} was the function {content}, which a file cannot hold: give {name} as an argument")
    if tag == "dtype" and isinstance(content, str):
        found = getattr(torch, content, None)
        if isinstance(found, torch.dtype):
            return found
    if tag == "device" and isinstance(content, str):
        try:
            return torch.device(content)
        except RuntimeError as error:
            raise ValueError(f"{name}: unknown device {content!r}; give {name} as an argument") from error
    raise ValueError(f"{name}: {content!r} is no {tag}; the settings file was not written by this version")
