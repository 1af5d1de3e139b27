"""The command line: exit codes, one sentence for bad input, options over the file's own settings."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bbvi_conv.cli import app
from bbvi_conv.objectives import CIWAE, IWAE, MIWAE, PIWAE, VRIWAE, Objective
from bbvi_conv.program import Minibatch
from bbvi_conv.run import Settings
from bbvi_conv.settings import decode

MODEL = """
import pyro, pyro.distributions as dist, torch
import bbvi_conv as bc

X = torch.tensor([0.5, 1.0, 2.0, -1.0])

def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

def data():
    return (X,)
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return path


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2 and one sentence, on one line of stderr, that holds the words."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("bbvi-conv: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def fit(tmp_path: Path, text: str, *options: str) -> Result:
    return call("fit", write(tmp_path, text), "--out", tmp_path / "run", "--steps", "60", *options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, of a run too short to converge."""
    folder = tmp_path_factory.mktemp("finished")
    result = fit(folder, MODEL)
    assert result.exit_code == 3, (result.output, result.exception)
    return folder / "run"


def copy_of(run: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, folder / "copy"))


# Bad input


def test_no_such_file(tmp_path: Path) -> None:
    assert_refused(call("fit", tmp_path / "none.py"), "no such model file", "none.py")


def test_a_file_without_model(tmp_path: Path) -> None:
    assert_refused(fit(tmp_path, MODEL.replace("def model", "def mdl")), "has no `model`; it defines mdl")
    assert_refused(call("fit", f"{tmp_path / 'mine.py'}:other"), "has no model 'other'; it defines mdl")


def test_a_guide_without_a_latent(tmp_path: Path) -> None:
    guide = 'def guide(x):\n    pyro.sample("w", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))\n'
    assert_refused(fit(tmp_path, MODEL + guide), "'z'", "guide")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('pyro.plate("rows", len(x))', 'pyro.plate("rows", 3)', ("x",)),
        ("dist.Normal(z, 1.0)", "dist.Normal(z, torch.ones(3))", ("x",)),
        ("dist.Normal(z, 1.0), obs", "dist.Normal(z + torch.ones(3) * x, 1.0), obs", ("mine.py, line", "size")),
    ],
)
def test_a_shape_mismatch(tmp_path: Path, old: str, new: str, words: tuple[str, ...]) -> None:
    assert old in MODEL
    assert_refused(fit(tmp_path, MODEL.replace(old, new)), *words)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_data_that_are_not_finite(tmp_path: Path, value: str) -> None:
    text = MODEL.replace("[0.5, 1.0, 2.0, -1.0]", f'[0.5, 1.0, float("{value}"), float("{value}")]')
    assert_refused(fit(tmp_path, text), "argument 0", value.removeprefix("-"), "2")


def test_a_wrong_support(tmp_path: Path) -> None:
    likelihood = MODEL.replace("dist.Normal(z, 1.0), obs", "dist.Bernoulli(logits=z), obs")
    assert_refused(fit(tmp_path, likelihood), "x")
    guide = 'def guide(x):\n    pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))\n'
    prior = MODEL.replace("dist.Normal(0.0, 1.0)", "dist.Exponential(1.0)")
    assert_refused(fit(tmp_path, prior + guide), "z")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--family", "fullrank"), ("unknown family 'fullrank'", "full-rank")),
        (("--objective", "elob"), ("unknown objective 'elob'", "elbo")),
        (("--estimator", "score"), ("unknown estimator 'score'", "sticking-the-landing")),
        (("--engine", "fast"), ("unknown engine 'fast'", "traced")),
        (("--device", "toaster"), ("unknown device 'toaster'",)),
        (("--dtype", "float8"), ("unknown dtype 'float8'", "float64")),
        (("--plate", "columns", "--minibatch", "2"), ("no plate 'columns'", "rows")),
        (("--minibatch", "2"), ("--plate is needed too",)),
        (("--plate", "rows"), ("--minibatch is needed too",)),
        (("--minibatch", "0", "--plate", "rows"), ("size must be at least 1, got 0",)),
        (("--minibatch", "5", "--plate", "rows"), ("minibatch size 5 exceeds the 4 rows",)),
        (("--steps", "-5"), ("max_steps must be at least 1, got -5",)),
        (("--particles", "0"), ("num_particles must be at least 1, got 0",)),
        (("--seed", "-1"), ("--seed must be at least 0, got -1",)),
        (("--tol", "-0.1"), ("tol must be positive", "-0.1")),
        (("--step-size", "0"), ("step size must be positive", "0")),
        (("--step-size", "inf"), ("step size must be positive and finite",)),
        (("--max-norm", "0"), ("max_norm must be positive", "0")),
    ],
)
def test_an_option_value_that_is_none(tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_refused(fit(tmp_path, MODEL, *options), *words)
    assert not (tmp_path / "run" / "config.json").exists()


def test_values_and_options_the_parser_itself_refuses(tmp_path: Path) -> None:
    for options in (("--steps", "many"), ("--colour", "red")):
        result = fit(tmp_path, MODEL, *options)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_a_family_beside_the_files_own_guide(tmp_path: Path) -> None:
    guide = 'def guide(x):\n    pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))\n'
    assert_refused(fit(tmp_path, MODEL + guide, "--family", "mean-field"), "mine.py has a guide of its own")


def test_an_unknown_setting_in_the_file(tmp_path: Path) -> None:
    assert_refused(fit(tmp_path, MODEL + "fit = {'setps': 3}\n"), "mine.py", "unknown setting 'setps'", "max_steps")


def test_an_error_in_the_users_model_is_told_with_its_line(tmp_path: Path) -> None:
    text = MODEL.replace("    z = pyro", "    y = undefined_name\n    z = pyro")
    assert_refused(fit(tmp_path, text), "mine.py, line 8: NameError: name 'undefined_name' is not defined")


def test_an_output_directory_that_holds_a_run(finished: Path) -> None:
    before = (finished / "config.json").read_bytes()
    for command in (("fit", "conjugate_gaussian", "--out", finished), ("rerun", finished, "--out", finished)):
        assert_refused(call(*command), "already holds a run", "--out")
    assert (finished / "config.json").read_bytes() == before


@pytest.mark.parametrize("command", [("report",), ("resume",), ("rerun", "--out", "new")])
def test_a_run_directory_that_is_none(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert_refused(call(*command, tmp_path), "is no run directory")
    assert_refused(call(*command, tmp_path / "none"), "no such run directory")


def test_a_truncated_checkpoint(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    for path in run.glob("checkpoint/*/state.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert_refused(call("resume", run), "no sound checkpoint is left", "truncated")


def test_steps_more_that_are_negative(finished: Path, tmp_path: Path) -> None:
    assert_refused(call("resume", copy_of(finished, tmp_path), "--steps", "-3"), "steps must be at least 1, got -3")


# Outcomes


def test_a_loss_that_is_not_finite_is_an_outcome(tmp_path: Path) -> None:
    """An enormous step throws the log scale out of range; the last finite state is kept and told."""
    result = fit(tmp_path, MODEL, "--step-size", "1e200")
    assert result.exit_code == 3, (result.output, result.exception)
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert verdict["outcome"] == "diverged"
    assert "step " in verdict["reasons"][0]
    assert "'" in verdict["reasons"][0]  # a site is named


def test_a_converged_run_ends_with_0_and_any_other_with_3(tmp_path: Path, finished: Path) -> None:
    path = write(tmp_path, MODEL)
    result = call("fit", path, "--out", tmp_path / "run", "--estimator", "sticking-the-landing", "--tol", "0.5")
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert (result.exit_code, verdict["outcome"]) == (0, "converged"), result.output
    assert result.stdout.splitlines()[0].startswith("converged")
    assert str(tmp_path / "run" / "report.html") in result.stdout
    assert json.loads((finished / "verdict.json").read_text())["outcome"] != "converged"


def test_a_run_leaves_everything_in_its_directory(finished: Path) -> None:
    expected = {"config.json", "checkpoint", "monitor.csv", "verdict.json", "posterior.nc", "report.html", "log.txt"}
    assert expected <= {path.name for path in finished.iterdir()}


def test_options_override_the_file_which_overrides_the_library(tmp_path: Path) -> None:
    own = 'fit = {"max_steps": 7, "tol": 0.25, "optimiser": bc.SGD(bc.Constant(0.001)), "seed": 4}\n'
    path = write(tmp_path, MODEL + own)
    options = ["--tol", "0.75", "--step-size", "0.002", "--family", "full-rank", "--dtype", "float32"]
    options += ["--particles", "3", "--max-norm", "4", "--quiet"]
    assert call("fit", path, "--out", tmp_path / "run", *options).exit_code == 3
    settings: dict[str, Any] = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["max_steps"], settings["tol"], settings["seed"]) == (7, 0.75, 4)
    rule = {"class": "Constant", "size": 0.002}
    assert settings["optimiser"] == {"class": "SGD", "step_size": rule, "max_norm": 4.0}
    assert settings["family"]["class"] == "FullRank"
    assert settings["objective"]["num_particles"] == 3
    assert settings["dtype"] == {"dtype": "float32"}


def test_a_minibatch_from_the_options(tmp_path: Path) -> None:
    result = fit(tmp_path, MODEL, "--minibatch", "2", "--plate", "rows")
    assert result.exit_code in (0, 3), (result.output, result.exception)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["minibatch"] == {"class": "Minibatch", "size": 2, "plate": "rows", "sampling": "iid"}


def test_one_option_leaves_the_rest_of_the_librarys_choice(tmp_path: Path) -> None:
    """The bound and the step-size rule depend on whether rows are subsampled; an option changes its own part only."""
    whole, part, quiet = Settings(), Settings(minibatch=Minibatch(2, plate="rows")), "sticking-the-landing"
    cases = (
        (whole, ["--objective", "elbo"], whole.bound(), None),
        (whole, ["--estimator", quiet], replace(whole.bound(), estimator=quiet), None),
        (part, ["--particles", "7"], replace(part.bound(), num_particles=7), None),
        (whole, ["--step-size", "0.5"], None, whole.rule()),
        (part, ["--step-size", "0.5"], None, part.rule()),
    )
    for index, (base, options, objective, rule) in enumerate(cases):
        rows = ["--minibatch", "2", "--plate", "rows"] if base is part else []
        out = tmp_path / str(index)
        result = call("fit", write(tmp_path, MODEL), "--out", out, "--steps", "5", *rows, *options)
        assert result.exit_code == 3, (result.output, result.exception)
        settings = json.loads((out / "config.json").read_text())["settings"]
        assert decode(settings["objective"]) == objective
        expected = None if rule is None else replace(rule, step_size=replace(rule.step_size, size=0.5))
        assert decode(settings["optimiser"]) == expected


def test_quiet_says_nothing(tmp_path: Path) -> None:
    result = fit(tmp_path, MODEL, "--quiet")
    assert (result.exit_code, result.output) == (3, "")


def test_without_out_the_run_is_named_after_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, MODEL + "second = model\n")
    for spec, name in ((str(path), "mine"), (f"{path}:second", "mine-second")):
        assert call("fit", spec, "--steps", "5").exit_code == 3
        assert (tmp_path / "runs" / name / "verdict.json").exists()
        assert_refused(call("fit", spec, "--steps", "5"), f"runs/{name} already holds a run", "--out")


def test_a_rerun_gives_the_same_numbers_and_says_so(finished: Path, tmp_path: Path) -> None:
    result = call("rerun", finished, "--out", tmp_path / "again")
    assert result.exit_code == 3, (result.output, result.exception)
    assert result.stdout.splitlines()[-1] == "the same numbers"


def test_a_rerun_with_other_numbers_says_which(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    config = json.loads((run / "config.json").read_text())
    config["settings"]["num_gradients"] += 1
    (run / "config.json").write_text(json.dumps(config))
    result = call("rerun", run, "--out", tmp_path / "again")
    assert result.exit_code == 3, (result.output, result.exception)
    last = result.stdout.splitlines()[-1]
    assert last.startswith("not the same numbers: ")
    assert "gradient_norm_sq" in last


def test_the_report_can_be_written_again(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    (run / "report.html").unlink()
    result = call("report", run)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")


def test_the_assumptions_of_a_run_are_printed(finished: Path) -> None:
    result = call("assumptions", finished)
    assert result.exit_code == 0, (result.output, result.exception)
    assert re.search(r"^  (holds|fails|unknown) +step size C / sqrt\(n\)", result.stdout, re.MULTILINE)
    assert "terms of the rate" in result.stdout


# The program itself


def program(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own, which hears Ctrl-C also where the tests run in the background."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from bbvi_conv.cli import app; "
    code += "app()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from bbvi_conv.cli import app; "
    code += "app(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "bbvi_conv.cli" in loaded
    assert not loaded & {"torch", "pyro", "arviz", "numpy", "matplotlib"}
    times = []
    for _ in range(5):
        start = time.perf_counter()
        command = [sys.executable, "-m", "bbvi_conv", "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "Usage: bbvi-conv " in shown
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


@pytest.mark.parametrize("family", ["mean-field", "full-rank"])
def test_a_fit_and_its_report_load_no_library_for_a_number(family: str, tmp_path: Path) -> None:
    """Each took between half a second and two of every fit's start."""
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from bbvi_conv.cli import app; app()"
    model = Path(__file__).parent.parent / "models/eight_schools.py"
    arguments = ["fit", str(model), "--family", family, "--steps", "200", "--engine", "traced"]
    command = [sys.executable, "-c", code, *arguments, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "matplotlib" in loaded
    assert (tmp_path / "run" / "report.html").exists()
    assert not loaded & {"sympy", "scipy.stats", "arviz", "arviz_stats"}


def test_models_are_listed_by_name_and_first_line() -> None:
    result = call("models")
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == sorted(path.stem for path in (Path(__file__).parents[1] / "models").glob("*.py"))


def test_ctrl_c_leaves_what_there_is(tmp_path: Path) -> None:
    """Stopped in the middle of a long run: exit code 3, a verdict on disk, and the steps made are in it."""
    path = write(tmp_path, MODEL)
    out = tmp_path / "run"
    with program("fit", path, "--out", out, "--steps", "10000000", "--tol", "1e-12", "--engine", "traced") as running:
        try:
            wait_for_checkpoint(out, running)
            os.kill(running.pid, signal.SIGINT)
            stdout, stderr = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 3, stderr
    verdict = json.loads((out / "verdict.json").read_text())
    assert 0 < verdict["steps"] < 10_000_000
    assert "stopped by the user" in stdout


def test_a_run_that_is_being_written_is_not_resumed_by_another(tmp_path: Path) -> None:
    path, out = write(tmp_path, MODEL), tmp_path / "run"
    with program("fit", path, "--out", out, "--steps", "10000000", "--tol", "1e-12", "--engine", "traced") as running:
        try:
            wait_for_checkpoint(out, running)
            assert_refused(call("resume", out, "--steps", "10"), f"is being written by process {running.pid}")
        finally:
            running.kill()
            running.communicate(timeout=60)


def wait_for_checkpoint(out: Path, running: subprocess.Popen[str]) -> None:
    """Until a few checkpoints have been written, of a run that goes on."""
    deadline = time.monotonic() + 300
    while max((int(path.name) for path in out.glob("checkpoint/*[0-9]")), default=0) < 3:
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("--objective", "iwae", "--particles", "5", "--estimator", "doubly-reparameterised"),
            IWAE(5, "doubly-reparameterised"),
        ),
        (("--objective", "vr-iwae", "--particles", "3", "--alpha", "0.25"), VRIWAE(3, 0.25)),
        (("--objective", "ciwae", "--particles", "3", "--elbo-weight", "0.75"), CIWAE(3, 0.75)),
        (("--objective", "miwae", "--groups", "2", "--particles", "3"), MIWAE(2, 3)),
        (("--objective", "piwae", "--groups", "2", "--particles", "2"), PIWAE(2, 2)),
    ],
)
def test_every_bound_by_options(tmp_path: Path, options: tuple[str, ...], expected: Objective) -> None:
    result = fit(tmp_path, MODEL, *options, "--quiet")
    assert result.exit_code in (0, 3), (result.output, result.exception)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert decode(config["settings"]["objective"]) == expected


def test_options_of_another_bound_are_refused(tmp_path: Path) -> None:
    assert_refused(fit(tmp_path, MODEL, "--objective", "iwae", "--alpha", "0.5"), "--alpha does not apply to iwae")
    assert_refused(fit(tmp_path, MODEL, "--groups", "2"), "--groups does not apply to ELBO")
    assert_refused(fit(tmp_path, MODEL, "--objective", "vr-iwae", "--alpha", "1"), "alpha must lie in [0, 1)")
    assert_refused(fit(tmp_path, MODEL, "--objective", "vi"), "unknown objective 'vi'", "vr-iwae")
