"""Whose the engine's time is. The clock is the test's."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.powercap import Clock
from pocketlm.compute_time import ComputeTime


@dataclass(eq=False)
class Account:
    compute_s: float = 0.0


def test_a_block_is_divided_evenly() -> None:
    clock, two = Clock(), (Account(), Account(1.0))
    time = ComputeTime(clock)
    with time.spent_on(*two):
        clock.now_s += 3
    clock.now_s += 5
    assert [each.compute_s for each in two] == [1.5, 2.5]
    assert time.busy_s == 3


def test_a_blocks_time_counts_while_it_is_under_way() -> None:
    clock, account = Clock(), Account()
    time = ComputeTime(clock)
    with time.spent_on(account):
        clock.now_s += 2
        assert time.busy_s == 2
        clock.now_s += 1
    assert (time.busy_s, account.compute_s) == (3, 3)


def test_a_block_that_fails_counts() -> None:
    clock, account = Clock(), Account()
    time = ComputeTime(clock)
    with pytest.raises(ZeroDivisionError), time.spent_on(account):
        clock.now_s += 2
        1 / 0  # noqa: B018
    clock.now_s += 2
    assert (time.busy_s, account.compute_s) == (2, 2)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.sets(st.integers(0, 3)))))
def test_the_accounts_and_nobodys_time_add_up(blocks: list[tuple[int, int, set[int]]]) -> None:
    clock, accounts = Clock(), [Account() for _ in range(4)]
    time = ComputeTime(clock)
    nobodys_s = 0.0
    for busy_s, idle_s, owners in blocks:
        with time.spent_on(*(accounts[n] for n in owners)):
            clock.now_s += busy_s
        clock.now_s += idle_s
        nobodys_s += 0 if owners else busy_s
    assert time.busy_s == sum(busy_s for busy_s, _, _ in blocks)
    assert sum(each.compute_s for each in accounts) + nobodys_s == pytest.approx(time.busy_s)


def test_it_never_falls_for_a_reader_on_another_thread() -> None:
    time, stop = ComputeTime(), threading.Event()

    def compute() -> None:
        while not stop.is_set():
            with time.spent_on():
                pass

    thread = threading.Thread(target=compute, name="computes")
    thread.start()
    try:
        seen = [time.busy_s for _ in range(5_000)]
    finally:
        stop.set()
        thread.join()
    assert seen == sorted(seen)
