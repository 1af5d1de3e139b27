"""A run that is killed, over and over, and taken up again ends in the same bits as one that was left alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bbvi_conv as bc
from bbvi_conv.archive import Archive, data_hash
from bbvi_conv.model_file import load_model
from bbvi_conv.recipe import ModelSource
from bbvi_conv.run_directory import RunDirectory

GLOBAL = """
import pyro, pyro.distributions as dist, torch
import bbvi_conv as bc

fit = {"family": bc.FullRank(), "objective": bc.ELBO(2, "sticking-the-landing"), "window": 100, "khat_draws": 100}

def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, tau), obs=x)

def data():
    return (torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),)
"""

AMORTIZED = (
    (Path(__file__).parent / "files" / "amortized.py").read_text(encoding="utf-8")
    + """
import bbvi_conv as bc

fit = {"minibatch": bc.Minibatch(16, plate="data"), "dtype": torch.float32, "seed": 3, "window": 100, "khat_draws": 100}
"""
)

MODELS = {"global": GLOBAL, "amortized": AMORTIZED}
STEPS = 500


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "bbvi_conv", *map(str, arguments), "--quiet"]


def fit_command(spec: str, out: Path) -> list[str]:
    """A run that never reaches its tolerance, so that it makes all its steps."""
    return command("fit", spec, "--steps", str(STEPS), "--tol", "1e-12", "--out", out)


def numbers(run: Path) -> dict[str, Any]:
    """The verdict without its times."""
    return {name: value for name, value in json.loads((run / "verdict.json").read_text()).items() if name != "seconds"}


def newest(run: Path) -> int:
    return max((int(path.name) for path in run.glob("checkpoint/*[0-9]")), default=0)


def assert_same(run: Path, other: Path) -> None:
    """Verdict, monitor, settings and every tensor of the last checkpoint, to the last bit."""
    assert numbers(run) == numbers(other)
    for name in ("monitor.csv", "config.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    (mine, meta), (theirs, their_meta) = (RunDirectory.open(path).load_checkpoint() for path in (run, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    assert {**meta, "seconds": None} == {**their_meta, "seconds": None}


@pytest.fixture(scope="module", params=sorted(MODELS))
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model file and a run of it that nobody disturbed: three windows and a part of the fourth."""
    folder = tmp_path_factory.mktemp(request.param)
    spec = str(folder / "mine.py")
    Path(spec).write_text(MODELS[request.param], encoding="utf-8")
    assert subprocess.run(fit_command(spec, folder / "run"), check=False).returncode == 3
    return spec, folder / "run"


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(undisturbed: tuple[str, Path], tmp_path: Path) -> None:
    spec, reference = undisturbed
    out, moments, kills = tmp_path / "run", random.Random(1), 0
    stride = max(1, newest(reference) // 6)  # checkpoints are rarer where steps are quick: four kills fit in any run
    next_command = fit_command(spec, out)
    while kills < 4:
        target = newest(out) + moments.randint(0, stride)
        with subprocess.Popen(next_command) as running:
            while running.poll() is None and newest(out) < target:
                time.sleep(0.0005)
            time.sleep(moments.uniform(0, 0.02))
            running.kill()
        if running.returncode == 3:
            break
        assert running.returncode == -9
        kills += 1
        if RunDirectory(out).has_checkpoint():
            RunDirectory.open(out).load_checkpoint()  # whatever the moment, there is a whole one
        if RunDirectory(out).holds_run():
            next_command = command("resume", out)
    assert kills >= 3  # power: it was killed before its end, and more than once
    assert subprocess.run(command("resume", out), check=False).returncode == 3
    assert_same(out, reference)


def test_a_run_stopped_between_looks_in_one_process_ends_in_the_same_bits(
    undisturbed: tuple[str, Path], tmp_path: Path
) -> None:
    """Ctrl-C inside a look, then ``load`` and ``resume``: the same folder, the same bits."""
    spec, reference = undisturbed
    config = json.loads((reference / "config.json").read_text())
    looks = 0

    def stop(state: bc.FitState) -> None:
        nonlocal looks
        looks += 1
        if looks == 10:
            raise KeyboardInterrupt

    found = load_model(spec)
    settings = {**found.defaults, "max_steps": STEPS, "tol": 1e-12, "seed": config["settings"]["seed"]}
    source = bc.ModelSource(str(found.path), found.name)
    options = {"out": tmp_path / "run", "source": source, "on_look": stop, "progress": False}
    first = bc.fit(found.model, found.guide, found.args, **options, **settings)
    assert 0 < first.state.step < STEPS
    again = bc.load(tmp_path / "run")
    assert torch.equal(again.x, first.x)
    again.resume(progress=False)
    assert_same(tmp_path / "run", reference)


def test_a_run_that_fails_keeps_its_last_look_and_goes_on(
    undisturbed: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in what is called after a look, where checkpoints are so slow that none but the first is due."""
    spec, reference = undisturbed
    config = json.loads((reference / "config.json").read_text())
    seen: list[bc.FitState] = []
    slow = Archive.checkpoint

    def checkpoint(self: Archive, state: bc.FitState, seed: int) -> None:
        time.sleep(1.0)
        slow(self, state, seed)

    def fail(state: bc.FitState) -> None:
        seen.append(state)
        if len(seen) == 10:
            raise OSError("the disk that on_look writes to is full")

    monkeypatch.setattr(Archive, "checkpoint", checkpoint)
    found = load_model(spec)
    settings = {**found.defaults, "max_steps": STEPS, "tol": 1e-12, "seed": config["settings"]["seed"]}
    settings |= {"out": tmp_path / "run", "source": bc.ModelSource(str(found.path), found.name), "progress": False}
    with pytest.raises(OSError, match="is full"):
        bc.fit(found.model, found.guide, found.args, on_look=fail, **settings)
    monkeypatch.undo()
    assert len(list((tmp_path / "run" / "checkpoint").iterdir())) == 2  # of ten looks, the first and the last
    again = bc.load(tmp_path / "run")
    assert again.state.step == seen[-1].step > seen[0].step
    assert torch.equal(again.state.carry.x, seen[-1].carry.x)
    again.resume(progress=False)
    assert_same(tmp_path / "run", reference)


def test_more_steps_go_on_from_the_last_one(undisturbed: tuple[str, Path], tmp_path: Path) -> None:
    import shutil

    _, reference = undisturbed
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    assert subprocess.run(command("resume", run, "--steps", "100"), check=False).returncode == 3
    assert numbers(run)["steps"] == STEPS + 100
    old, new = ((path / "monitor.csv").read_text() for path in (reference, run))
    assert new.startswith(old)
    assert len(new) > len(old)


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_settings(
    undisturbed: tuple[str, Path], tmp_path: Path
) -> None:
    """config.json is all that is there."""
    _, reference = undisturbed
    with RunDirectory.create(tmp_path / "run") as run:
        run.write_text("config.json", (reference / "config.json").read_text())
    assert subprocess.run(command("resume", tmp_path / "run"), check=False).returncode == 3
    assert_same(tmp_path / "run", reference)


def test_other_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(AMORTIZED.replace("200", "100"), encoding="utf-8")
    assert subprocess.run(command("fit", path, "--steps", "5", "--out", tmp_path / "run"), check=False).returncode == 3
    path.write_text(AMORTIZED.replace("200", "101"), encoding="utf-8")
    done = subprocess.run(command("resume", tmp_path / "run"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the data are not those of the run" in done.stderr


TWO = """
import pyro, pyro.distributions as dist, torch

def model(y):
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b = pyro.sample("b", dist.Normal(50.0, 10.0))
    pyro.sample("y", dist.Normal(a, 1.0).expand([4]).to_event(1), obs=y)

def data():
    return (torch.tensor([0.3, -0.2, 1.0, 0.4]),)
"""
SWAPPED = "\n".join(TWO.splitlines()[:4] + TWO.splitlines()[5:3:-1] + TWO.splitlines()[6:])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SWAPPED, "its parameters were .*a .*b.*, and are .*b .*a"),
        (TWO.replace('"b"', '"c"'), "its parameters were .*and are .*c"),
        (TWO.replace("50.0, 10.0", "50.0, 11.0"), "at the same draw log_p was .*, and is"),
        (TWO.replace("50.0, 10.0)", "50.0, 10.0).expand([2]).to_event(1)"), r"its parameters were .*and are .*\(2,\)"),
    ],
    ids=["swapped", "renamed", "another prior", "another shape"],
)
def test_another_model_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(TWO, encoding="utf-8")
    file = load_model(str(path))
    bc.fit(
        file.model, args=file.args, max_steps=20, out=tmp_path / "run", source=ModelSource(str(path)), progress=False
    )
    path.write_text(f"# a remark\n{TWO}", encoding="utf-8")
    assert bc.load(tmp_path / "run").state.step == 20
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"the model is not that of the run in .*: {told}.*put it back, or fit anew"):
        bc.load(tmp_path / "run")


class Plain:
    def __init__(self, value: object) -> None:
        self.value = value


@pytest.mark.parametrize(
    "make",
    [
        lambda x: {"y": np.linspace(0.0, x, 5000)},
        lambda x: [torch.full((2000,), x), "words"],
        lambda x: Plain({"inside": torch.full((2000,), x)}),
        lambda x: (x, None, ["a"]),
        lambda x: np.array(["a", x], dtype=object),
        lambda x: {"a", "b", x},
    ],
    ids=["numpy", "list", "object", "numbers", "objects of numpy", "set"],
)
def test_data_are_told_apart_by_what_they_hold(make: Callable[[float], Any]) -> None:
    assert data_hash((make(1.0),), {}) == data_hash((make(1.0),), {})
    assert data_hash((make(1.0),), {}) != data_hash((make(1.5),), {})
    assert data_hash((make(1.0),), {}) != data_hash((), {"y": make(1.5)})
