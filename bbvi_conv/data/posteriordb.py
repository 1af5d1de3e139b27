"""Posteriors with reference draws, from a copy of posteriordb.

Read with ``json`` and ``zipfile`` alone: the package of the same name is not needed. Source: Magnusson et al.,
"posteriordb: a set of posteriors for Bayesian inference and probabilistic programming",
https://github.com/stan-dev/posteriordb.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bbvi_conv.data._files import escapes, locate, read_single_member

ROOT = "posteriordb/posterior_database"


@dataclass(frozen=True)
class Posterior:
    """One posterior: what was observed, and what a long run of MCMC found.

    Attributes:
        name: such as ``"eight_schools-eight_schools_noncentered"``.
        data: the model's data, as in the database: numbers and nested lists.
        draws: by parameter (``"mu"``, ``"theta[1]"``, indices from 1), float64 ``(chains, draws)``, on the constrained
            scale.
    """

    name: str
    data: dict[str, Any]
    draws: dict[str, npt.NDArray[np.float64]]


def posterior(name: str) -> Posterior:
    """Read one posterior of the database below ``BBVI_CONV_DATA``.

    Args:
        name: the posterior's name there, ``DATA-MODEL``.
    Raises:
        FileNotFoundError: there is no copy of the database.
        ValueError: it has no such posterior, no reference draws for it, or a damaged file.
    """
    if escapes(name) or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} is no name of a posterior; give one such as 'eight_schools-eight_schools_centered'")
    entry = _entry(name)
    reference = entry.get("reference_posterior_name")
    if reference is None:
        raise ValueError(f"posterior {name} has no reference draws in this database; choose one that has")
    path = locate(f"{ROOT}/data/data/{entry['data_name']}.json.zip")
    data = _table(path, _json(read_single_member(path), path))
    return Posterior(name, data, _draws(locate(f"{ROOT}/reference_posteriors/draws/draws/{reference}.json.zip")))


def _entry(name: str) -> dict[str, Any]:
    try:
        path = locate(f"{ROOT}/posteriors/{name}.json")
    except FileNotFoundError as error:
        known = _known_names()
        if not known:
            raise
        close = difflib.get_close_matches(name, known, n=3) or known
        raise ValueError(f"no posterior {name!r} in the database; did you mean {', '.join(close)}?") from error
    return _table(path, _json(path.read_bytes(), path), "data_name")


def _known_names() -> list[str]:
    """Names of all posteriors, found beside one that every copy of the database has; empty if there is no database."""
    try:
        anchor = locate(f"{ROOT}/posteriors/eight_schools-eight_schools_noncentered.json")
    except FileNotFoundError:
        return []
    return sorted(path.stem for path in anchor.parent.glob("*.json"))


def _draws(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Stack a list of chains, each a table from parameter to draws, to one ``(chains, draws)`` array a parameter."""
    chains = _json(read_single_member(path), path)
    if not chains or not isinstance(chains, list) or not all(isinstance(chain, dict) for chain in chains):
        raise ValueError(f"{path} is not a list of chains of named draws; get it again")
    if any(chain.keys() != chains[0].keys() for chain in chains):
        raise ValueError(f"the chains in {path} do not name the same parameters; get it again")
    try:
        draws = {key: np.array([chain[key] for chain in chains], dtype=np.float64) for key in chains[0]}
    except (TypeError, ValueError) as error:
        raise ValueError(f"the chains in {path} are not numbers of one length ({error}); get it again") from error
    for key, value in draws.items():
        if value.ndim != 2 or not np.isfinite(value).all():
            raise ValueError(
                f"the draws of {key} in {path} are not finite numbers in chains of one length; get it again"
            )
    return draws


def _table(path: Path, content: Any, *required: str) -> dict[str, Any]:
    if not isinstance(content, dict) or any(key not in content for key in required):
        raise ValueError(f"{path} is not a table of named values{' with ' if required else ''}{', '.join(required)}")
    return content


def _json(content: bytes, path: Path) -> Any:
    """Parse JSON; the path is for the error's sentence."""
    try:
        return json.loads(content)
    except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
        raise ValueError(f"{path} does not hold JSON ({error}); get it again") from error
