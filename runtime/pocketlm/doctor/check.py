"""What a check says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

State = Literal["ok", "absent", "note", "problem"]
"""absent: not there, and nothing needs it. note: it works, but could be better. problem: pocketlm does not
keep a promise here until somebody does something. From good to bad."""

_ORDER: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    state: State
    text: str  # for a person
    remedy: str | None = None  # what to do, or what would be better still
    facts: Mapping[str, Any] = field(default_factory=dict)  # for a program: JSON values, units in names
    group: str = ""

    def of(self, group: str) -> Self:
        return dataclasses.replace(self, group=group)


@dataclass(frozen=True)
class Report:
    checks: tuple[Check, ...]

    @property
    def state(self) -> State:
        """The worst of all checks: ok, note or problem."""
        states: list[State] = ["ok", *(check.state for check in self.checks)]
        worst = max(states, key=_ORDER.index)
        return "ok" if worst == "absent" else worst

    def count(self, state: State) -> int:
        return sum(check.state == state for check in self.checks)
