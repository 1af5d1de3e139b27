"""What a check of assumptions returns: conditions with a verdict each, and the terms of the rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Status = Literal["holds", "fails", "unknown"]


class Condition(NamedTuple):
    """One condition of a theorem.

    Attributes:
        theorem: whose.
        name: what is asked.
        status: ``"holds"`` is never said on the word of a sample; ``"fails"`` comes with a witness; else ``"unknown"``.
        where: the site, module, leaf or option it is about.
        why: in one sentence, with numbers.
    """

    theorem: str
    name: str
    status: Status
    where: str
    why: str


class Term(NamedTuple):
    """A measured factor of a rate: a regressor, not the number of the bound, whose constants nobody knows."""

    name: str
    value: float | None
    meaning: str


@dataclass(frozen=True)
class Assumptions:
    """Conditions and terms; prints as a table."""

    conditions: tuple[Condition, ...]
    terms: tuple[Term, ...]

    def status(self, name: str) -> Status:
        """The worst status among the conditions of that name.

        Raises:
            KeyError: no such condition.
        """
        found = {c.status for c in self.conditions if c.name == name}
        if not found:
            raise KeyError(f"no condition {name!r}; the conditions are {sorted({c.name for c in self.conditions})}")
        return "fails" if "fails" in found else "unknown" if "unknown" in found else "holds"

    @property
    def failing(self) -> tuple[Condition, ...]:
        """Conditions that fail."""
        return tuple(c for c in self.conditions if c.status == "fails")

    def to_json(self) -> dict[str, object]:
        """Plain values; a term beyond floating point is null."""
        finite = [t._replace(value=t.value if t.value is None or math.isfinite(t.value) else None) for t in self.terms]
        return {"conditions": [c._asdict() for c in self.conditions], "terms": [t._asdict() for t in finite]}

    def __str__(self) -> str:
        width = max((len(c.name) for c in self.conditions), default=0)
        lines, theorem = [], ""
        for c in self.conditions:
            if c.theorem != theorem:
                theorem = c.theorem
                lines.append(f"{theorem}:")
            lines.append(f"  {c.status:<7}  {c.name:<{width}}  {c.where}: {c.why}")
        lines.append("terms of the rate, as measured:")
        for term in self.terms:
            value = "not available" if term.value is None else f"{term.value:.4g}"
            lines.append(f"  {term.name} = {value}  ({term.meaning})")
        return "\n".join(lines)
