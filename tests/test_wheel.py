"""The built wheel, in a fresh environment: it imports, lists and fits the shipped models, and leaks no `models`."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / "models").glob("*.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as for a release: a source archive from the checkout, the wheel from that archive."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; returns its folder of programs.

    Dependencies come from the environment of the tests by one line in a .pth file. Lines of .pth files in a folder
    added so are not followed, so an editable bbvi_conv over there stays out of sight.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    python = Path(paths["scripts"]) / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        str(wheel),
        cwd=folder,
    )
    (Path(paths["purelib"]) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return Path(paths["scripts"])


def run(*command: str, cwd: Path, expected: tuple[int, ...] = (0,)) -> str:
    """Run a program away from the checkout, with nothing of it on the path; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in expected, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_holds_the_package_its_models_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"bbvi_conv", "bbvi_conv-0.1.0.dist-info"}
    assert "bbvi_conv/py.typed" in names
    assert sorted(Path(name).stem for name in names if name.startswith("bbvi_conv/_models/")) == SHIPPED
    package = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "bbvi_conv").rglob("*.py*") if path.suffix != ".pyc"
    }
    assert package <= set(names)


def test_the_wheels_own_copy_is_imported(fresh: Path, tmp_path: Path) -> None:
    code = "import importlib.util, bbvi_conv.data; print(bbvi_conv.__file__, importlib.util.find_spec('models'))"
    file, spec = run(str(fresh / "python"), "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(fresh.parent)
    assert spec == "None"


def test_shipped_models_are_listed(fresh: Path, tmp_path: Path) -> None:
    lines = run(str(fresh / "bbvi-conv"), "models", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in lines if line.strip()] == SHIPPED


def test_a_shipped_model_is_fitted(fresh: Path, tmp_path: Path) -> None:
    command = ("fit", "eight_schools", "--family", "full-rank", "--steps", "200", "--seed", "0", "--out", "run")
    run(str(fresh / "bbvi-conv"), *command, cwd=tmp_path, expected=(0, 3))
    assert {"config.json", "verdict.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
