"""The report stands alone, says the verdict first, and can be written from the run directory."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import bbvi_conv as bc
from bbvi_conv import ModelSource
from bbvi_conv.model_file import load_model
from bbvi_conv.report import number_rows, render, write_report
from bbvi_conv.verdict import OUTCOMES

MODELS = Path(__file__).parents[1] / "models"
PREFIX = "data:image/png;base64,"


@pytest.fixture(scope="module")
def page(run: Any) -> str:
    return render(run[0])


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.style = False

    def handle_data(self, data: str) -> None:
        if not self.style:
            self.words.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run, and its directory."""
    path = MODELS / "conjugate_gaussian.py"
    loaded, out = load_model(str(path)), tmp_path_factory.mktemp("runs") / "run"
    settings = {"max_steps": 300, "window": 100, "tol": 1e-6, "khat_draws": 100, "progress": False}
    fit = bc.fit(loaded.model, None, loaded.args, out=out, source=ModelSource(str(path)), **settings)
    return fit, out


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    tags = Page(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    links = [v for _, attrs in tags for k, v in attrs.items() if k in ("src", "href", "srcset", "action", "data")]
    assert len(links) == 4
    assert all(link is not None and link.startswith(PREFIX) for link in links)
    assert not [k for _, attrs in tags for k in attrs if k.startswith("on")]
    assert "://" not in page
    assert "url(" not in page


def test_the_figures_are_there(page: str) -> None:
    sources = [attrs["src"] for tag, attrs in Page(page).tags if tag == "img"]
    assert len(sources) == 4
    for source in sources:
        assert source is not None
        image = imread(io.BytesIO(base64.b64decode(source.removeprefix(PREFIX))), format="png")
        assert image.shape[1] >= 1000
        assert len(np.unique(image[..., 0])) > 50  # axes, curves and their smoothed edges; a blank page has one


def test_the_assumptions_of_the_theory_are_shown(run: Any, page: str) -> None:
    text, found = Page(page).text, run[0].assumptions()
    assert "What the theory asks" in text
    assert {c.status for c in found.conditions} == {"holds", "fails", "unknown"}
    for condition in found.conditions:
        assert f"{condition.name} {condition.status} {condition.where} {' '.join(condition.why.split())}" in text
    for term in found.terms:
        assert f"{term.name} " in text


def test_the_verdict_comes_first_in_words(run: Any, page: str) -> None:
    verdict, text = run[0].verdict, Page(page).text
    sentence = OUTCOMES[verdict.outcome]
    places = [text.index(sentence[1:]), *(text.index(" ".join(reason.split())) for reason in verdict.reasons)]
    assert places == sorted(places)
    assert places[-1] < text.index("Numbers") < text.index("Figures") < text.index("Settings") < text.index("Versions")


def test_the_numbers_are_those_of_the_verdict(run: Any, page: str) -> None:
    fit = run[0]
    numbers = fit.verdict.numbers
    rows = {row.name: row for row in number_rows(numbers, fit.settings.tol)}
    gap = numbers["remaining_gap_nats"]
    assert float(rows["remaining gap, nats"].value) == pytest.approx(gap["value"], rel=6e-3)
    low, high = (float(end) for end in rows["remaining gap, nats"].interval.split(" to "))
    assert (low, high) == (pytest.approx(gap["low"], rel=6e-3), pytest.approx(gap["high"], rel=6e-3))
    theta = rows["squared gradient norm, generative (theta)"]
    assert theta.value == "not available"
    assert theta.note == numbers["gradient_norm_sq"]["theta"]["reason"]
    assert rows["PSIS k-hat"].against == "≤ 0.50"  # 1 - 1 / log10(100)
    text = Page(page).text
    for row in rows.values():
        assert row.name in text
        assert row.value in text
    assert f"seed {fit.settings.seed}" in text
    assert "observation (50)" in text


def test_what_comes_from_outside_is_escaped(run: Any) -> None:
    fit = run[0]
    kept = fit.source, fit.verdict
    reason = "the site '<script>alert(1)</script>' is bad"
    try:
        fit.source, fit.verdict = ModelSource("<b>model</b>.py"), dataclasses.replace(fit.verdict, reasons=(reason,))
        page = render(fit)
    finally:
        fit.source, fit.verdict = kept
    assert "<script>" not in page
    assert "<b>" not in page
    assert html.escape("<b>model</b>.py") in page
    assert reason in Page(page).text


def test_a_run_directory_is_enough(run: Any, tmp_path: Path) -> None:
    fit, out = run
    made = (out / "report.html").read_text(encoding="utf-8")
    write_report(out, tmp_path / "again.html")
    again = (tmp_path / "again.html").read_text(encoding="utf-8")
    images = [[a["src"] for t, a in Page(text).tags if t == "img"] for text in (made, again)]
    assert images[0] == images[1]
    assert all(reason in Page(again).text for reason in fit.verdict.reasons)
    assert [p.name for p in tmp_path.iterdir()] == ["again.html"]
    with pytest.raises((ValueError, FileNotFoundError)):
        write_report(tmp_path, tmp_path / "none.html")


def test_a_failing_report_leaves_the_old_one(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("bbvi_conv.report.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_report(run[0], path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == "old"
