"""``docs/performance.md`` from the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = {
    "case": "case",
    "threads": "threads",
    "engine": "engine",
    "ours_us": "ours",
    "numpyro_scan_us": "NumPyro scan",
    "pyro_us": "Pyro",
    "pyro_jit_us": "Pyro jit",
    "ratio_numpyro_scan": "ours / NumPyro scan",
    "spread": "spread",
    "ratio_pyro": "Pyro / ours",
    "ours_fit_us": "bc.fit",
    "numpyro_run_us": "svi.run",
    "monitor_share": "monitor",
}
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"


def cell(key: str, value: Any) -> str:
    """A number as a reader wants it; an en dash where there is none.

    >>> cell("ours_us", 1234.5), cell("ratio_pyro", 132.7), cell("spread", 0.034), cell("pyro_us", None)
    ('1,234', '133', '3%', '–')
    """
    if value is None:
        return "\N{EN DASH}"
    if key in ("spread", "monitor_share"):
        return f"{100 * value:.0f}%"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers.

    >>> round(geometric_mean([1.0, 4.0]), 12)
    2.0
    """
    return math.exp(sum(map(math.log, values)) / len(values))


def markdown(result: Mapping[str, Any]) -> str:
    """The table with what it was measured on, the summary ratios, and the notes."""
    rows = result["rows"]
    lines = [
        f"Measured {result['date']} on {result['processor']} ({result['cores']} cores), Python {result['python']}, "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
        + ". Microseconds per step; ratios are medians of interleaved rounds, spread is their interquartile range over "
        "the median. `bc.fit` and `svi.run` are whole runs as a user calls them, compiling (and our monitor) included.",
        "",
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + "|".join("---" if key in ("case", "engine") else "--:" for key in COLUMNS) + "|",
        *("| " + " | ".join(cell(key, row.get(key)) for key in COLUMNS) + " |" for row in rows),
        "",
    ]
    for threads in sorted({row["threads"] for row in rows}):
        ratios = [r["ratio_numpyro_scan"] for r in rows if r["threads"] == threads and r["ratio_numpyro_scan"]]
        if ratios:
            lines.append(
                f"- {threads} thread{'s' * (threads > 1)}: geometric mean of ours / NumPyro scan "
                f"{geometric_mean(ratios):.2f}, largest {max(ratios):.2f}, over {len(ratios)} cases."
            )
    for case in dict.fromkeys(row["case"] for row in rows):
        row = next(r for r in rows if r["case"] == case)
        said = [row["notes"]] if row["notes"] else []
        said += [f"ours / {name} {value:.2g}" for name, value in row.get("ratio_others", {}).items()]
        said += [f"{contender}: {reason}" for contender, reason in row["missing"].items()]
        if said:
            lines.append(f"- {case}: {'; '.join(said)}.")
    return "\n".join(lines) + "\n"


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Put the table between its marks in a page, which is made if absent; the rest of the page stays."""
    block = f"{BEGIN}\n{markdown(result)}{END}\n"
    page = path.read_text(encoding="utf-8") if path.exists() else f"# Performance\n\n{BEGIN}\n{END}\n"
    if BEGIN not in page or END not in page:
        raise ValueError(f"{path} has no marks {BEGIN} and {END} for the table: put them where it is to go")
    before, after = page.split(BEGIN, 1)[0], page.split(END, 1)[1].lstrip("\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before + block + (f"\n{after}" if after else ""), encoding="utf-8")
