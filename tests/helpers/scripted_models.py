"""Models that load, fail and close as a test's script says, and watch how a store treats them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from helpers.tiny_bundle import tiny_manifest
from pocketlm.aio import AsyncModel
from pocketlm.server.memory import MemoryEstimate
from pocketlm.server.served_models import ServedModel


@dataclass(frozen=True)
class Sized(ServedModel):
    """Of a given size, of which the half is needed for a first answer."""

    bytes: int = 10

    @property
    def memory(self) -> MemoryEstimate:
        half = self.bytes // 2
        return MemoryEstimate(half, 0, 0, 0, 1, self.bytes - half)


def sized(name: str, size: int = 10) -> Sized:
    return Sized(name, Path("/nowhere") / name, tiny_manifest(name=name), 1e9, bytes=size)


class ScriptedModel:
    """Stands for an AsyncModel and for the model in it."""

    def __init__(self, name: str, script: Script) -> None:
        self.name = name
        self.script = script
        self.closed = False
        self.busy_s = 0.0
        self.context_length = 48
        self.under_way = (0, 0)

    @property
    def model(self) -> ScriptedModel:
        return self

    async def close(self) -> None:
        self.busy_s += 0.25  # what was under way is cancelled first
        await asyncio.sleep(self.script.close_s)
        self.closed = True
        self.script.alive.remove(self)
        if self.script.close_error is not None:
            raise self.script.close_error


@dataclass
class Script:
    """`load` is for a ModelStore. What it must never see is in `violations`."""

    budget_bytes: int | None = None
    load_s: float = 1.0
    close_s: float = 0.5
    close_error: Exception | None = None
    failures: dict[str, Exception] = field(default_factory=dict)  # of the next load of that name
    stubborn: bool = False  # loads on when it is cancelled
    begun: list[str] = field(default_factory=list)
    loading: list[str] = field(default_factory=list)
    alive: list[ScriptedModel] = field(default_factory=list)  # until they are closed
    violations: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return sorted(model.name for model in self.alive)

    async def load(self, served: ServedModel) -> AsyncModel:
        name = served.name
        self.begun.append(name)
        self._look(served)
        self.loading.append(name)
        try:
            await asyncio.sleep(self.load_s)
        except asyncio.CancelledError:
            if not self.stubborn:
                raise
        finally:
            self.loading.remove(name)
        if name in self.failures:
            raise self.failures.pop(name)
        model = ScriptedModel(name, self)
        self.alive.append(model)
        return cast(AsyncModel, model)

    def _look(self, served: ServedModel) -> None:
        if self.loading:
            self.violations.append(f"{served.name} is loaded while {self.loading[0]} is")
        if served.name in self.names:
            self.violations.append(f"{served.name} is loaded twice")
        self.sizes[served.name] = served.memory.most_bytes
        total = served.memory.most_bytes + sum(self.sizes[name] for name in self.names)
        if self.budget_bytes is not None and self.alive and total > self.budget_bytes:
            self.violations.append(f"{served.name} beside {self.names} takes {total}")
