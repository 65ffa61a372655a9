"""Any interleaving of asking, going away, releasing, failing and expiring: what a store never does."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pytest import MonkeyPatch

from helpers.scripted_models import Script, ScriptedModel, sized
from helpers.virtual_time import VirtualTimeLoop
from pocketlm.errors import BundleError
from pocketlm.server import model_store
from pocketlm.server.model_store import Lease, ModelStore, ModelTooLargeError, ModelUnavailableError

SIZES = {"a": 10, "b": 10, "c": 15, "big": 40, "huge": 90}
BUDGET = 25  # two small ones; big fits alone for one answer, huge never
LONG_S = 1000.0
EXPECTED = (BundleError, ModelUnavailableError, ModelTooLargeError, asyncio.CancelledError)

names = st.sampled_from([*"aabbcc", "big", "huge"])
keep_alives = st.sampled_from([0.0, 0.3, 2.0, 20.0])
# Loading takes 1 s and unloading 0.5 s, so that these end before, at and after both.
pauses = st.sampled_from([None, 0.0, 0.3, 0.5, 1.0, 1.7, 3.0])
indices = st.integers(0, 1 << 16)


async def _nothing() -> None:
    pass


class StoreMachine(RuleBasedStateMachine):
    @initialize(keep_alive_s=keep_alives)
    def make(self, keep_alive_s: float) -> None:
        self.patch = MonkeyPatch()
        self.patch.setattr(model_store, "_return_freed_memory", _nothing)
        self.loop = VirtualTimeLoop()
        self.script = Script(budget_bytes=BUDGET)
        self.store = ModelStore(
            [sized(name, size) for name, size in SIZES.items()],
            load=self.script.load,
            budget_bytes=BUDGET,
            keep_alive_s=keep_alive_s,
            clock=self.loop.time,
        )
        self.waiting: list[asyncio.Task[Lease]] = []
        self.cancelled: set[asyncio.Task[Lease]] = set()
        self.leases: list[Lease] = []
        self.busy_s = 0.0

    def run(self, work: Any) -> None:
        self.loop.run_until_complete(work)
        self.collect()

    def go_on(self, pause_s: float | None) -> None:
        """None: nothing runs in between, 0: one round of the loop."""
        if pause_s is not None:
            self.run(asyncio.sleep(pause_s))

    def collect(self) -> None:
        for task in [task for task in self.waiting if task.done()]:
            self.waiting.remove(task)
            if task.cancelled():
                assert task in self.cancelled
            elif (error := task.exception()) is not None:
                assert isinstance(error, EXPECTED), error
            else:
                self.leases.append(task.result())

    @rule(name=names, pause_s=pauses)
    def acquire(self, name: str, pause_s: float | None) -> None:
        self.waiting.append(self.loop.create_task(self.store.acquire(name)))
        self.go_on(pause_s)

    @rule(name=names, held=st.booleans())
    def use(self, name: str, held: bool) -> None:
        """Asks and waits for as long as it takes, unless others are in front."""
        self.acquire(name, 3.0)
        if not held and self.leases:
            self.release(len(self.leases) - 1, twice=False, pause_s=None)

    @rule(pause_s=pauses)
    def wait(self, pause_s: float | None) -> None:
        self.go_on(pause_s)

    @precondition(lambda self: self.waiting)
    @rule(index=indices, pause_s=pauses)
    def cancel(self, index: int, pause_s: float | None) -> None:
        task = self.waiting[index % len(self.waiting)]
        self.cancelled.add(task)
        task.cancel()
        self.go_on(pause_s)

    @precondition(lambda self: self.leases)
    @rule(index=indices, twice=st.booleans(), pause_s=pauses)
    def release(self, index: int, twice: bool, pause_s: float | None) -> None:
        lease = self.leases.pop(index % len(self.leases))

        async def release() -> None:
            lease.release()
            if twice:
                lease.release()

        self.run(release())
        self.go_on(pause_s)

    @precondition(lambda self: self.leases)
    @rule(index=indices)
    def compute(self, index: int) -> None:
        cast(ScriptedModel, self.leases[index % len(self.leases)].model).busy_s += 1.0

    @rule(name=names)
    def fail_next(self, name: str) -> None:
        self.script.failures[name] = BundleError(f"{name} is altered.")

    @rule(name=names, seconds=keep_alives)
    def keep_alive(self, name: str, seconds: float) -> None:
        async def keep_alive() -> None:
            self.store.set_keep_alive(name, seconds)

        self.run(keep_alive())

    @rule(name=names, pause_s=pauses)
    def unload(self, name: str, pause_s: float | None) -> None:
        self.loop.create_task(self.store.unload(name))
        self.go_on(pause_s)

    @rule()
    def quiesce(self) -> None:
        """Whoever waits is served or refused in the end, and what nobody uses is unloaded."""
        self.run(asyncio.sleep(LONG_S))
        assert not self.waiting
        assert self.script.names == sorted({lease.name for lease in self.leases})
        for state in self.store.states():
            assert (state.loading, state.waiting, state.expires_at) == (False, 0, None)
            assert state.loaded == (state.served.name in self.script.names)

    @invariant()
    def nothing_that_must_not_be(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.script.violations == []
        assert not any(cast(ScriptedModel, lease.model).closed for lease in self.leases)
        loaded = [state for state in self.store.states() if state.loaded]
        assert len(loaded) <= 1 or sum(state.memory_bytes or 0 for state in loaded) <= BUDGET
        assert {state.served.name for state in loaded} <= set(self.script.names)
        assert self.store.busy_s >= self.busy_s
        self.busy_s = self.store.busy_s

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.leases.clear()  # closing ends them
        self.run(self.store.close())
        self.run(asyncio.sleep(0))
        assert not self.waiting
        assert (self.script.names, self.script.loading) == ([], [])
        self.run(asyncio.sleep(LONG_S))
        assert not asyncio.all_tasks(self.loop)
        assert self.script.names == []
        self.loop.close()
        self.patch.undo()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
