"""posteriordb: the real database against the package of that name, and made-up ones with every kind of damage."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bbvi_conv.data import posterior

DATA = os.environ.get("BBVI_CONV_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="BBVI_CONV_DATA names no folder of real data")


@needs_data
@pytest.mark.parametrize("name", ["eight_schools-eight_schools_noncentered", "arK-arK", "diamonds-diamonds"])
def test_the_database_is_read_as_its_own_package_reads_it(name: str) -> None:
    posteriordb = pytest.importorskip("posteriordb")
    theirs = posteriordb.PosteriorDatabase(f"{DATA}/posteriordb/posterior_database").posterior(name)
    ours = posterior(name)
    assert ours.data == theirs.data.values()
    chains = theirs.reference_draws()
    assert ours.draws.keys() == chains[0].keys()
    for key, draws in ours.draws.items():
        assert draws.shape == (10, 1000)
        assert np.array_equal(draws, [chain[key] for chain in chains])


@needs_data
def test_every_posterior_can_be_read() -> None:
    names = [path.stem for path in Path(DATA, "posteriordb/posterior_database/posteriors").glob("*.json")]
    assert len(names) == 23
    for name in names:
        assert {draws.shape for draws in posterior(name).draws.values()} == {(10, 1000)}


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database of one posterior, two chains of three draws; returns its root."""
    monkeypatch.setenv("BBVI_CONV_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "posteriordb" / "posterior_database"
    name = "eight_schools-eight_schools_noncentered"
    entry = {"name": name, "data_name": "eight_schools", "reference_posterior_name": name}
    write(root / "posteriors" / f"{name}.json", entry)
    write(root / "data/data/eight_schools.json.zip", {"J": 2, "y": [1.0, 2.0]})
    write(draws_of(root), [{"mu": [1, 2, 3], "tau": [0.5, 0.5, 0.25]}, {"mu": [4, 5, 6], "tau": [1, 1, 1]}])
    return root


def draws_of(root: Path) -> Path:
    return root / "reference_posteriors/draws/draws/eight_schools-eight_schools_noncentered.json.zip"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(path.stem, text)
    else:
        path.write_text(text, encoding="utf-8")


NAME = "eight_schools-eight_schools_noncentered"


def test_a_made_up_database_is_read(database: Path) -> None:
    read = posterior(NAME)
    assert (read.name, read.data) == (NAME, {"J": 2, "y": [1.0, 2.0]})
    assert np.array_equal(read.draws["mu"], [[1, 2, 3], [4, 5, 6]])
    assert read.draws["mu"].dtype == np.float64


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ("[", "does not hold JSON"),
        ([], "not a list of chains"),
        ({"mu": [1]}, "not a list of chains"),
        ([{"mu": [1]}, {"tau": [1]}], "do not name the same parameters"),
        ([{"mu": [1, 2]}, {"mu": [1]}], "not numbers of one length"),
        ([{"mu": ["x", "y"]}], "not numbers of one length"),
        ([{"mu": 1}], "the draws of mu"),
        ('[{"mu": [1, NaN]}]', "the draws of mu"),
    ],
)
def test_damaged_draws_are_refused(database: Path, draws: Any, message: str) -> None:
    write(draws_of(database), draws)
    with pytest.raises(ValueError, match=message):
        posterior(NAME)


def test_a_damaged_entry_is_refused(database: Path) -> None:
    write(database / f"posteriors/{NAME}.json", {"name": NAME})
    with pytest.raises(ValueError, match="with data_name"):
        posterior(NAME)
    write(
        database / f"posteriors/{NAME}.json", {"name": NAME, "data_name": "../../x", "reference_posterior_name": NAME}
    )
    with pytest.raises(ValueError, match="does not stay below the data folder"):
        posterior(NAME)
    write(database / f"posteriors/{NAME}.json", {"name": NAME, "data_name": "eight_schools"})
    with pytest.raises(ValueError, match="no reference draws"):
        posterior(NAME)


def test_a_wrong_name_gets_a_suggestion(database: Path) -> None:
    with pytest.raises(ValueError, match=f"did you mean {NAME}"):
        posterior("eight_schools_noncentered")
    for name in ("../eight_schools", "a/b", "a\\b", ""):
        with pytest.raises(ValueError, match="is no name of a posterior"):
            posterior(name)


def test_without_a_database_the_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BBVI_CONV_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="BBVI_CONV_DATA"):
        posterior(NAME)
