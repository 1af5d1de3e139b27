"""Model files: what is found in them, what is refused, and what is left untouched."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bbvi_conv.model_file import line_of, load_model, locate_model, models_folder, shipped

PLAIN = """
def model(x):
    return x

def data():
    return (1, 2)
"""


def write(folder: Path, text: str, name: str = "mine.py") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_gives_model_guide_data_and_defaults(tmp_path: Path) -> None:
    spec = write(tmp_path, PLAIN + "def guide(x): ...\nfit = {'tol': 0.5}\n")
    found = load_model(spec)
    assert found.path == Path(spec).resolve()
    assert found.model(3) == 3
    assert found.guide is not None
    assert found.args == (1, 2)
    assert found.kwargs == {}
    assert found.defaults == {"tol": 0.5}


def test_a_dict_of_data_is_taken_as_keyword_arguments(tmp_path: Path) -> None:
    found = load_model(write(tmp_path, "def model(x): ...\ndef data(): return {'x': 1}\n"))
    assert (found.args, found.kwargs) == ((), {"x": 1})


def test_name_picks_a_model_with_the_guide_of_its_name(tmp_path: Path) -> None:
    text = PLAIN + "def guide(x): ...\ndef other(x): ...\ndef bare(x): ...\ndef other_guide(x): ...\n"
    spec = write(tmp_path, text)
    other = load_model(spec + ":other")
    assert other.model.__name__ == "other"
    assert other.guide is not None
    assert other.guide.__name__ == "other_guide"
    assert load_model(spec + ":bare").guide is None  # the file's `guide` is for `model`
    assert load_model(spec + ":model").guide is not None


def test_shipped_models_load_by_name_and_are_listed_without_being_run() -> None:
    listed = dict(shipped())
    assert list(listed) == sorted(path.stem for path in models_folder().glob("*.py"))
    assert all(line.endswith((".", "`).")) for line in listed.values())
    assert load_model("eight_schools").model.__name__ == "model"
    assert load_model("eight_schools:centered").model.__name__ == "centered"
    assert locate_model("eight_schools:centered") == (models_folder() / "eight_schools.py", "centered")


def test_no_top_level_models_package_appears(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    load_model(write(tmp_path / "models", PLAIN))
    load_model("eight_schools")
    assert not any(name == "models" or name.startswith("models.") for name in sys.modules)
    assert str(models_folder()) not in sys.path


def test_networks_and_data_follow_the_seed_and_no_generator_moves(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        "import random\nimport numpy as np\nimport torch\nnet = torch.nn.Linear(3, 3)\n"
        "def model(*x): ...\ndef data(): return (torch.randn(4), np.random.randn(), random.random())\n"
        "def weight(): return net.weight\n",
    )
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    runs = [load_model(spec, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
    weights = [run.model.__globals__["net"].weight for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(runs[0].args[0], runs[1].args[0])
    assert runs[0].args[1:] == runs[1].args[1:]
    assert all(a != b for a, b in zip(runs[0].args[1:], runs[2].args[1:], strict=True))


def test_the_seed_of_the_fit_dict_counts_unless_another_is_given(tmp_path: Path) -> None:
    spec = write(tmp_path, "import torch\nfit = {'seed': 5}\ndef model(x): ...\ndef data(): return (torch.randn(2),)\n")
    own, same, other = load_model(spec), load_model(spec, seed=5), load_model(spec, seed=6)
    assert (own.seed, other.seed) == (5, 6)
    assert torch.equal(own.args[0], same.args[0])
    assert not torch.equal(own.args[0], other.args[0])


def test_a_file_may_import_its_neighbours_and_hold_dataclasses(tmp_path: Path) -> None:
    write(tmp_path, "ANSWER = 42\n", "neighbour_of_mine.py")
    spec = write(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbour_of_mine import ANSWER\n"
        "@dataclass\nclass Prior:\n    scale: float = ANSWER\ndef model(x): ...\ndef data(): return (Prior().scale,)\n",
    )
    path = list(sys.path)
    assert load_model(spec).args == (42,)
    assert sys.path == path
    del sys.modules["neighbour_of_mine"]


def test_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    spec = write(tmp_path, PLAIN)
    assert load_model(spec).args == (1, 2)
    write(tmp_path, PLAIN.replace("(1, 2)", "(3, 4)"))
    assert load_model(spec).args == (3, 4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.py"]  # no byte code is left behind


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("def data(): return ()", "", "has no `model`; it defines no functions"),
        ("def centred(x): ...\ndef data(): return ()", "", "has no `model`; it defines centred"),
        (PLAIN, ":modle", "has no model 'modle'; it defines model"),
        ("def model(x): ...", "", "has no `data\\(\\)`"),
        (
            "def model(x): ...\ndef data():\n    return (1 / 0,)",
            "",
            "line 3: its data\\(\\) failed with ZeroDivisionError",
        ),
        ("def model(x): ...\ndef data(): return 1.0", "", "returned float, not the tuple"),
        ("def model(x): ...\ndef data(): return {1: 2}", "", "returned dict, not the tuple"),
        ("def model(x): ...\ndef data(: ...", "", "line 2: running the file failed with SyntaxError"),
        ("import sys\nsys.exit(3)", "", "line 2: running the file failed with SystemExit"),
        ("import no_such_thing_here", "", "line 1: running the file failed with ModuleNotFoundError: No module named"),
        (PLAIN + "def fit(): ...", "", "`fit` must be a dict of keyword arguments"),
        (PLAIN + "fit = {'seed': -1}", "", "the seed in its fit dict must be an integer of at least 0, got -1"),
        (PLAIN + "guide = 3", "", "its guide is no function but int"),
    ],
)
def test_a_bad_file_gets_one_sentence_that_names_it(tmp_path: Path, text: str, suffix: str, message: str) -> None:
    spec = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(spec + suffix)
    assert str(Path(spec).resolve()) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"no such model file 'none\.py'.*eight_schools"):
        load_model("none.py")
    with pytest.raises(FileNotFoundError, match="no such model file 'eight_school'"):
        load_model("eight_school:centered")


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder, not a model file"):
        load_model(str(tmp_path))


def test_the_line_of_an_error_is_the_last_one_in_the_file(tmp_path: Path) -> None:
    found = load_model(write(tmp_path, "def model(x):\n    y = 1\n    return y / x\ndef data(): return ()\n"))
    with pytest.raises(ZeroDivisionError) as caught:
        found.model(0)
    assert line_of(caught.value, found.path) == 3
    assert line_of(caught.value, tmp_path / "other.py") is None
