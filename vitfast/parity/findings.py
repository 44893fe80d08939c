"""What a diagnosis found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Step(NamedTuple):
    """A substitution: in which of the two models, its name, and what it puts in place of what."""

    model: str
    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.model} with {self.what}"


@dataclass(frozen=True)
class Finding:
    """Attributes:
    stage: the first that it explains.
    alternatives: substitutions that explain it equally well, each one step or two.
    before, after: how far apart the two are at that stage, as a share of what it adds.
    """

    stage: str
    alternatives: tuple[tuple[Step, ...], ...]
    before: float
    after: float

    @property
    def names(self) -> tuple[str, ...]:
        """What it is about, each name once."""
        return tuple(dict.fromkeys(step.name for steps in self.alternatives for step in steps))

    def __str__(self) -> str:
        said = [" and ".join(map(str, steps)) for steps in self.alternatives]
        other = {"a": "b", "b": "a"}[self.alternatives[0][0].model]
        found = f"{said[0]} gives {other}'s {self.stage}: {self.before:.1e} -> {self.after:.1e}"
        return found + "".join(f"\n    or {each}, which can't be told from it" for each in said[1:])


@dataclass(frozen=True)
class Diagnosis:
    """Attributes:
    findings: in the order of their stages.
    unexplained: stages for which no substitution was found.
    notes: what could not be tried.
    """

    findings: tuple[Finding, ...]
    unexplained: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the findings are about, such as 'eps' or 'gelu'."""
        return tuple(dict.fromkeys(name for finding in self.findings for name in finding.names))

    def to_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "findings": [
                {
                    "stage": finding.stage,
                    "before": finding.before,
                    "after": finding.after,
                    "alternatives": [[step._asdict() for step in steps] for steps in finding.alternatives],
                }
                for finding in self.findings
            ],
            "unexplained": list(self.unexplained),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"diagnosis: {finding}" for finding in self.findings]
        if self.unexplained:
            lines.append(f"diagnosis: no substitution was found for {', '.join(self.unexplained)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
