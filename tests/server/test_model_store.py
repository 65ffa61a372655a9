"""Models on demand: one load for all who wait, the budget, keep-alive, and every interleaving of them."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from helpers.scripted_models import Script, ScriptedModel, sized
from helpers.virtual_time import run_virtually
from pocketlm.aio import AsyncModel
from pocketlm.errors import BundleError, InvalidSettingError
from pocketlm.manifest import read_manifest
from pocketlm.server import model_store
from pocketlm.server.model_store import (
    Lease,
    ModelState,
    ModelStore,
    ModelTooLargeError,
    ModelUnavailableError,
    ServedModel,
    UnknownModelError,
)

T = TypeVar("T")

return_freed_memory = model_store._return_freed_memory


@pytest.fixture(autouse=True)
def no_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time on the virtual loop does not wait for threads."""

    async def nothing() -> None:
        pass

    with monkeypatch.context() as patch:
        patch.setattr(model_store, "_return_freed_memory", nothing)
        yield


def make_store(script: Script, *names: str, **options: Any) -> ModelStore:
    """Models of 10 bytes each; to be called on the loop."""
    models = [sized(name) for name in names or ("a", "b", "c")]
    return store_of(script, models, **options)


def store_of(script: Script, models: list[Any], *, keep_alive_s: float | None = None) -> ModelStore:
    return ModelStore(
        models,
        load=script.load,
        budget_bytes=script.budget_bytes,
        keep_alive_s=keep_alive_s,
        clock=asyncio.get_running_loop().time,
    )


def state(store: ModelStore, name: str) -> ModelState:
    return next(each for each in store.states() if each.served.name == name)


def later(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return asyncio.get_running_loop().create_task(work)


async def use(store: ModelStore, name: str | None = None) -> Any:
    """Acquires and releases; returns the scripted model."""
    async with await store.acquire(name) as lease:
        return lease.model


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class TestNames:
    def test_what_a_client_may_say(self) -> None:
        async def main() -> None:
            store = make_store(Script(), "Smol", "smol:int4")
            for name in ("Smol", "smol", "SMOL:latest", "smol:int8"):
                assert store.get(name).name == "Smol"
            assert store.get("SMOL:INT4").name == "smol:int4"

        run_virtually(main())

    @pytest.mark.parametrize(
        "name", ["", "smol:fp32", "../smol", "/nowhere/smol", "smol:int4:latest", "x" * 999]
    )
    def test_nothing_else(self, name: str) -> None:
        async def main() -> None:
            store = make_store(Script(), "smol", "smol:int4")
            for ask in (store.get, lambda name: store.set_keep_alive(name, 1)):
                with pytest.raises(UnknownModelError, match="It has: smol, smol:int4") as caught:
                    ask(name)
                assert len(str(caught.value)) < 300
            for wait in (store.acquire, store.unload):
                with pytest.raises(UnknownModelError):
                    await wait(name)

        run_virtually(main())

    def test_a_near_one_is_named(self) -> None:
        async def main() -> None:
            store = make_store(Script(), "smollm2-135m", "gemma-3-270m")
            with pytest.raises(UnknownModelError, match=r"'smollm-135m'.* Did you mean smollm2-135m\?"):
                store.get("smollm-135m")

        run_virtually(main())

    def test_without_a_name_it_is_the_first(self) -> None:
        async def main() -> None:
            script = Script()
            assert (await use(make_store(script))).name == "a"

        run_virtually(main())


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        ((), {}, "needs a model"),
        (("a", "A"), {}, "two models have the name A"),
        (("a",), {"budget_bytes": 0}, "memory budget is 0"),
        (("a",), {"keep_alive_s": float("nan")}, "NaN"),
    ],
)
def test_what_makes_no_store(names: tuple[str, ...], options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidSettingError, match=match):
        ModelStore(
            [sized(name) for name in names],
            **{"load": Script().load, "budget_bytes": None, "keep_alive_s": None, **options},
        )


class TestLoading:
    def test_all_who_ask_share_one_load(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script)
            models = await asyncio.gather(*(use(store, "a") for _ in range(5)))
            assert script.begun == ["a"]
            assert len(set(models)) == 1
            assert await use(store, "a") is models[0]

        run_virtually(main())

    def test_different_models_are_loaded_in_turn(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script)
            users = [later(use(store, name)) for name in ("c", "a", "b", "c")]
            await asyncio.sleep(0.5)
            assert [state(store, name).loading for name in "abc"] == [True] * 3
            assert [state(store, name).waiting for name in "abc"] == [1, 1, 2]
            await asyncio.gather(*users)
            assert script.begun == ["c", "a", "b"]
            assert script.violations == []

        run_virtually(main())

    def test_a_failure_is_everyones_and_the_next_one_tries_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def main() -> None:
            script = Script(failures={"a": BundleError("a is altered.")})
            store = make_store(script)
            failed = await asyncio.gather(*(use(store) for _ in range(3)), return_exceptions=True)
            assert [str(error) for error in failed] == ["a is altered."] * 3
            assert state(store, "a") == ModelState(
                store.get("a"), False, False, 0, 0, None, None, context_length=64
            )
            assert (await use(store)).name == "a"

        run_virtually(main())
        assert "could not load a: a is altered." in caplog.text

    def test_a_waiter_who_goes_leaves_the_load_to_the_others(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script)
            first, second = later(store.acquire("a")), later(store.acquire("a"))
            await asyncio.sleep(0.5)
            await cancel(first)
            lease = await second
            assert script.begun == ["a"]
            store.set_keep_alive("a", 1)
            await asyncio.sleep(5)
            assert script.names == ["a"]  # the one who went has not given back what the other uses
            lease.release()

        run_virtually(main())

    def test_if_all_go_it_is_loaded_all_the_same_and_expires(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script, keep_alive_s=10)
            waiter = later(store.acquire("a"))
            await asyncio.sleep(0.5)
            await cancel(waiter)
            await asyncio.sleep(1)
            assert script.names == ["a"]
            await asyncio.sleep(12)
            assert script.names == []

        run_virtually(main())

    def test_if_all_go_before_its_turn_it_is_not_loaded(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script)
            first, second = later(store.acquire("a")), later(store.acquire("b"))
            await asyncio.sleep(0.5)
            await cancel(second)
            await first
            await asyncio.sleep(5)
            assert script.begun == ["a"]
            assert (await use(store, "b")).name == "b"

        run_virtually(main())

    def test_a_load_that_was_cancelled_elsewhere_is_an_error(self) -> None:
        async def main() -> None:
            script = Script(failures={"a": asyncio.CancelledError()})  # type: ignore[dict-item]
            with pytest.raises(ModelUnavailableError, match="loading a was cancelled"):
                await use(make_store(script))

        run_virtually(main())

    def test_the_end_of_the_loop_ends_it(self) -> None:
        script = Script(load_s=1e6)

        async def main() -> None:
            later(use(make_store(script)))
            await asyncio.sleep(1)
            assert script.loading == ["a"]

        run_virtually(main())
        assert script.loading == []

    def test_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "pocketlm.server")

        async def main() -> None:
            store = make_store(Script(load_s=0.42), keep_alive_s=600)
            await use(store, "a")
            await asyncio.sleep(601)
            await use(store, "b")
            await store.unload("b")
            await use(store, "c")
            await store.close()

        run_virtually(main())
        assert [record.message for record in caplog.records] == [
            "loaded a in 0.4 s",
            "unloaded a after 10 min idle",
            "loaded b in 0.4 s",
            "unloaded b as it was asked to",
            "loaded c in 0.4 s",
            "unloaded c as the server ends",
        ]


class TestBudget:
    def test_the_least_recently_used_one_makes_room(self) -> None:
        async def main() -> None:
            script = Script(budget_bytes=20)
            store = make_store(script)
            for name in ("a", "b", "a", "c"):
                await use(store, name)
                await asyncio.sleep(1)
            assert script.names == ["a", "c"]
            assert script.violations == []

        run_virtually(main())

    def test_one_in_use_stays_although_it_was_used_before(self) -> None:
        async def main() -> None:
            script = Script(budget_bytes=20)
            store = make_store(script)
            async with await store.acquire("a"):
                await use(store, "b")
                await use(store, "c")
                assert script.names == ["a", "c"]

        run_virtually(main())

    def test_no_room_while_others_are_busy(self) -> None:
        async def main() -> None:
            script = Script(budget_bytes=20)
            store = make_store(script)
            first, second = await store.acquire("a"), await store.acquire("b")
            with pytest.raises(ModelUnavailableError, match=r"in use: a, b.*--memory-budget") as caught:
                await store.acquire("c")
            assert caught.value.retry_after_s > 0
            assert script.begun == ["a", "b"]
            first.release()
            assert (await use(store, "c")).name == "c"
            assert script.names == ["b", "c"]
            second.release()

        run_virtually(main())

    def test_nothing_is_unloaded_in_vain(self) -> None:
        async def main() -> None:
            script = Script(budget_bytes=30)
            store = store_of(script, [sized("a"), sized("b"), sized("big", 25)])
            async with await store.acquire("a"):
                await use(store, "b")
                with pytest.raises(ModelUnavailableError, match="models in use: a\\."):
                    await store.acquire("big")
                assert script.names == ["a", "b"]

        run_virtually(main())

    def test_one_that_may_outgrow_it_is_loaded_alone(self, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            script = Script(budget_bytes=20)
            store = store_of(script, [sized("a"), sized("big", 40)])
            await use(store, "a")
            async with await store.acquire("big"):
                assert script.names == ["big"]
                with pytest.raises(ModelUnavailableError, match="models in use: big"):
                    await store.acquire("a")
            await use(store, "a")
            assert script.names == ["a"]
            assert script.violations == []

        run_virtually(main())
        assert "big may grow to 40 B, beyond the memory budget of 20 B" in caplog.text

    def test_one_that_never_fits(self) -> None:
        async def main() -> None:
            script = Script(budget_bytes=20)
            store = store_of(script, [sized("a"), sized("huge", 50)])
            await use(store, "a")
            with pytest.raises(
                ModelTooLargeError, match=r"huge takes at least 25 B .* budget is 20 B.*--memory-budget"
            ):
                await store.acquire("huge")
            assert script.names == ["a"]

        run_virtually(main())

    def test_one_that_cannot_be_closed_does_not_block_the_others(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def main() -> None:
            script = Script(budget_bytes=10, close_error=OSError("no"))
            store = make_store(script)
            await use(store, "a")
            assert (await use(store, "b")).name == "b"

        run_virtually(main())
        assert "unloading a failed" in caplog.text


class TestKeepAlive:
    def test_counts_from_the_last_release(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script, keep_alive_s=10)
            await use(store, "a")
            await asyncio.sleep(8)
            lease = await store.acquire("a")
            await asyncio.sleep(100)
            assert script.names == ["a"]  # in use
            lease.release()
            await asyncio.sleep(9.9)
            assert script.names == ["a"]
            await asyncio.sleep(1)
            assert script.names == []
            assert not state(store, "a").loaded

        run_virtually(main())

    def test_says_when(self) -> None:
        async def main() -> None:
            store = make_store(Script(), keep_alive_s=1000)
            lease = await store.acquire("a")
            assert state(store, "a").expires_at is None
            lease.release()
            await asyncio.sleep(400)
            before = time.time()
            expires_at = state(store, "a").expires_at
            assert expires_at is not None
            assert before + 600 <= expires_at <= time.time() + 600

        run_virtually(main())

    @pytest.mark.parametrize("seconds", [None, -1, float("inf")])
    def test_for_ever(self, seconds: float | None) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script, keep_alive_s=10)
            await use(store, "a")
            store.set_keep_alive("a", seconds)
            await asyncio.sleep(1e6)
            assert script.names == ["a"]
            assert state(store, "a").expires_at is None

        run_virtually(main())

    def test_zero_unloads_as_soon_as_it_is_idle(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script)
            first, second = await store.acquire("a"), await store.acquire("a")
            store.set_keep_alive("a", 0)
            first.release()
            await asyncio.sleep(5)
            assert script.names == ["a"]
            second.release()
            await asyncio.sleep(1)
            assert script.names == []
            await use(store, "a")  # and then it is as it was
            await asyncio.sleep(1e6)
            assert script.names == ["a"]

        run_virtually(main())

    def test_set_before_it_is_loaded(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script)
            store.set_keep_alive("a", 5)
            await use(store, "a")
            await asyncio.sleep(6)
            assert script.names == []

        run_virtually(main())

    def test_nan(self) -> None:
        async def main() -> None:
            with pytest.raises(InvalidSettingError, match="NaN"):
                make_store(Script()).set_keep_alive("a", float("nan"))

        run_virtually(main())

    def test_who_asks_while_it_is_unloaded_gets_it_loaded_again(self) -> None:
        async def main() -> None:
            script = Script(close_s=2)
            store = make_store(script, keep_alive_s=10)
            before = await use(store, "a")
            await asyncio.sleep(11)  # now it is being closed
            after = await use(store, "a")
            assert before.closed
            assert not after.closed
            assert script.violations == []

        run_virtually(main())

    def test_who_asks_just_before_its_turn_keeps_it(self) -> None:
        async def main() -> None:
            script = Script(load_s=10)
            store = make_store(script, keep_alive_s=5)
            await use(store, "a")
            other = later(use(store, "b"))  # its load is under way when a expires
            await asyncio.sleep(6)
            lease = await store.acquire("a")
            await other
            await asyncio.sleep(1)
            assert not lease.model.closed  # type: ignore[attr-defined]
            assert "a" in script.names

        run_virtually(main())


class TestUnload:
    def test_an_idle_one(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script)
            await use(store, "a")
            await store.unload("a")
            assert script.names == []

        run_virtually(main())

    def test_one_in_use_when_it_is_idle(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script)
            lease = await store.acquire("a")
            await store.unload("a")
            await asyncio.sleep(5)
            assert script.names == ["a"]
            lease.release()
            await asyncio.sleep(1)
            assert script.names == []

        run_virtually(main())

    def test_one_that_is_being_loaded(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script)
            user = later(use(store, "a"))
            await asyncio.sleep(0.5)
            await store.unload("a")
            assert (await user).name == "a"
            await asyncio.sleep(1)
            assert script.names == []

        run_virtually(main())

    def test_means_nothing_for_the_next_load(self) -> None:
        async def main() -> None:
            script = Script(failures={"a": BundleError("altered")})
            store = make_store(script)
            await store.unload("a")  # it is not loaded
            failing = later(use(store, "a"))
            await asyncio.sleep(0.5)
            await store.unload("a")
            await asyncio.gather(failing, return_exceptions=True)
            await use(store, "a")
            await asyncio.sleep(5)
            assert script.names == ["a"]

        run_virtually(main())


class TestLease:
    def test_is_released_once(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script, keep_alive_s=0)
            first, second = await store.acquire("A:latest"), await store.acquire("a")
            assert (first.name, second.name) == ("a", "a")
            first.release()
            first.release()
            await asyncio.sleep(1)
            assert script.names == ["a"]
            second.release()
            await asyncio.sleep(1)
            assert script.names == []

        run_virtually(main())

    def test_ends_with_its_block(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script, keep_alive_s=0)
            with pytest.raises(ZeroDivisionError):
                async with await store.acquire("a"):
                    raise ZeroDivisionError
            await asyncio.sleep(1)
            assert script.names == []

        run_virtually(main())


class TestStates:
    def test_of_a_loaded_one(self) -> None:
        async def main() -> None:
            store = make_store(Script())
            model: ScriptedModel = await use(store, "b")
            model.under_way = (3, 2)
            assert [each.served.name for each in store.states()] == ["a", "b", "c"]
            assert state(store, "b") == ModelState(
                store.get("b"),
                loaded=True,
                loading=False,
                running=3,
                waiting=2,
                memory_bytes=10,
                expires_at=None,
                context_length=48,
            )

        run_virtually(main())

    def test_computed_seconds_stay_when_the_model_goes(self) -> None:
        async def main() -> None:
            store = make_store(Script(close_s=2))
            model = await use(store, "a")
            model.busy_s = 3.0
            other = await use(store, "b")
            other.busy_s = 1.5
            assert store.busy_s == 4.5
            unloading = later(store.unload("a"))
            await asyncio.sleep(1)
            assert store.busy_s == 4.75  # closing takes a little
            await unloading
            assert store.busy_s == 4.75
            await store.close()
            assert store.busy_s == 5.0

        run_virtually(main())


class TestClose:
    def test_unloads_all_even_those_in_use(self) -> None:
        async def main() -> None:
            script = Script()
            store = make_store(script, keep_alive_s=10)
            lease = await store.acquire("a")
            await use(store, "b")
            await store.close()
            assert script.names == []
            lease.release()
            await store.close()
            await asyncio.sleep(100)
            assert len(asyncio.all_tasks()) == 1
            with pytest.raises(ModelUnavailableError, match="about to end"):
                await store.acquire("a")

        run_virtually(main())

    @pytest.mark.parametrize("stubborn", [False, True])
    def test_while_loading(self, stubborn: bool) -> None:
        async def main() -> None:
            script = Script(stubborn=stubborn, load_s=1e6)
            store = make_store(script)
            waiters = [later(store.acquire(name)) for name in ("a", "a", "b")]
            await asyncio.sleep(0.5)
            await store.close()
            for waiter in waiters:
                with pytest.raises(ModelUnavailableError, match="about to end"):
                    await waiter
            assert script.begun == ["a"]
            assert (script.names, script.loading) == ([], [])
            assert asyncio.get_running_loop().time() < 10  # its own time: it has not waited for the load

        run_virtually(main())

    def test_while_room_is_made(self) -> None:
        async def main() -> None:
            script = Script(budget_bytes=10, close_s=2)
            store = make_store(script)
            await use(store, "a")
            waiter = later(store.acquire("b"))
            await asyncio.sleep(1)
            await store.close()
            with pytest.raises(ModelUnavailableError):
                await waiter
            assert script.begun == ["a"]
            assert script.names == []

        run_virtually(main())


async def gone(model: weakref.ref[Any]) -> None:
    """The thread that has closed it may hold it a moment longer."""
    async with asyncio.timeout(20):
        while model() is not None:
            await asyncio.sleep(0.001)


def test_a_real_model_answers_and_is_gone_when_it_is_unloaded(
    int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_store, "_return_freed_memory", return_freed_memory)
    served = ServedModel("tiny", int8_bundle, read_manifest(int8_bundle), 0.0)

    async def main() -> None:
        store = ModelStore(
            [served],
            load=lambda model: AsyncModel.load(model.folder, threads=1, context_length=model.context_length),
            budget_bytes=served.memory.most_bytes,
            keep_alive_s=None,
        )

        async def answer() -> weakref.ref[Any]:
            async with await store.acquire(None) as lease:
                assert isinstance(lease, Lease)
                await lease.model.generate([5, 6, 7], max_tokens=3, ignore_eos=True)
                assert (state(store, "tiny").running, state(store, "tiny").waiting) == (0, 0)
                assert state(store, "tiny").context_length == served.context_length
                return weakref.ref(lease.model.model)

        model = await answer()
        assert model() is not None
        busy_s = store.busy_s
        assert busy_s > 0
        await store.unload("tiny")
        await gone(model)
        assert store.busy_s >= busy_s
        again = await answer()
        await store.close()
        await gone(again)

    asyncio.run(main())
