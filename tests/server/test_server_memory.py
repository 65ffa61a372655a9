"""What a model may take, held against what the engine allocates, and what the machine has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny_bundle import tiny_manifest
from pocketlm.kv_cache import KVCache
from pocketlm.kv_pool import KVPool
from pocketlm.manifest import Dimensions, FileEntry
from pocketlm.server.memory import BUDGET_SHARE, MemoryEstimate, default_budget_bytes, estimate

DIMENSIONS = Dimensions(3, 24, 48, 4, 2, 6, 96, 4096)
FILES = {
    "model.onnx.data": FileEntry(7_000_000, "0" * 64),
    "model.onnx": FileEntry(50_000, "0" * 64),
    "tokenizer.json": FileEntry(1_000_000, "0" * 64),
}
MANIFEST = tiny_manifest(dimensions=DIMENSIONS, files=FILES)


def of(context_length: int = 512, concurrency: int = 4, cache_bytes: int = 1000) -> MemoryEstimate:
    return estimate(MANIFEST, context_length=context_length, concurrency=concurrency, cache_bytes=cache_bytes)


@given(st.integers(2, 600))
def test_a_slot_is_what_the_engine_allocates_for_one(context_length: int) -> None:
    assert of(context_length).slot_bytes == KVCache(DIMENSIONS, context_length).buffer.nbytes


@pytest.mark.parametrize("concurrency", [1, 2, 3, 4, 5, 8, 9])
def test_as_many_slots_as_that_many_answers_get(concurrency: int) -> None:
    pool = KVPool(DIMENSIONS, 8, 0)
    for _ in range(concurrency):
        pool.take([])
    assert of(concurrency=concurrency).slots == len(pool.slots)


def test_files_are_weights_but_for_the_tokenizer() -> None:
    found = of()
    assert found.weights_bytes == 7_050_000
    assert found.tokenizer_bytes > 10 * 1_000_000
    without = tiny_manifest(files={"model.onnx": FileEntry(5, "0" * 64)})
    assert estimate(without, context_length=8, concurrency=1, cache_bytes=0).tokenizer_bytes == 0


@given(st.integers(2, 4000), st.integers(1, 20), st.integers(0, 1 << 30))
def test_more_of_anything_takes_no_less(context_length: int, concurrency: int, cache_bytes: int) -> None:
    found = of(context_length, concurrency, cache_bytes)
    assert 0 < found.least_bytes <= found.most_bytes
    for more in (
        of(context_length + 1, concurrency, cache_bytes),
        of(context_length, concurrency + 1, cache_bytes),
        of(context_length, concurrency, cache_bytes + 1),
    ):
        assert more.least_bytes >= found.least_bytes
        assert more.most_bytes >= found.most_bytes


def test_sums() -> None:
    found = MemoryEstimate(1, 20, 300, slot_bytes=4000, slots=3, cache_bytes=50_000)
    assert (found.least_bytes, found.most_bytes) == (4321, 62_321)


OWN, GROUPS = "proc/self/cgroup", "sys/fs/cgroup"


class TestBudget:
    @pytest.fixture(autouse=True)
    def machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """100,000 bytes are available; the process is in the control group /outer/inner."""
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / OWN).write_text("1:cpu:/x\n0::/outer/inner\n")
        (tmp_path / GROUPS / "outer" / "inner").mkdir(parents=True)

    @staticmethod
    def limit(folder: Path, limit: str, used: int = 0, inactive_file: int = 0) -> None:
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\n")

    def test_a_share_of_what_is_available(self, tmp_path: Path) -> None:
        assert default_budget_bytes(tmp_path) == int(BUDGET_SHARE * 100_000)

    def test_of_what_the_narrowest_group_leaves(self, tmp_path: Path) -> None:
        self.limit(tmp_path / GROUPS / "outer", "60000", used=30_000, inactive_file=10_000)
        self.limit(tmp_path / GROUPS / "outer" / "inner", "50000")
        assert default_budget_bytes(tmp_path) == int(BUDGET_SHARE * 40_000)

    def test_no_limit(self, tmp_path: Path) -> None:
        self.limit(tmp_path / GROUPS / "outer" / "inner", "max")
        assert default_budget_bytes(tmp_path) == int(BUDGET_SHARE * 100_000)

    def test_the_group_of_a_container_is_the_root(self, tmp_path: Path) -> None:
        (tmp_path / OWN).write_text("0::/\n")
        self.limit(tmp_path / GROUPS, "20000", used=30_000)
        assert default_budget_bytes(tmp_path) == 0

    @pytest.mark.parametrize("content", ["1:cpu:/x\n", None])
    def test_no_control_groups(self, tmp_path: Path, content: str | None) -> None:
        own = tmp_path / OWN
        own.unlink() if content is None else own.write_text(content)
        assert default_budget_bytes(tmp_path) == int(BUDGET_SHARE * 100_000)

    def test_the_real_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        assert 0 < default_budget_bytes() < psutil.virtual_memory().total
