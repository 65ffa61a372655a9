"""Fake machines for the energy probes: a root folder with the /sys and /proc files that they read."""

from __future__ import annotations

from pathlib import Path

RANGE_UJ = 262_143_328_850  # as Intel's laptops have it


class Clock:
    """A clock that a test sets."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def add_zone(
    root: Path,
    zone: str,
    name: str,
    energy_uj: int = 0,
    *,
    range_uj: int | None = RANGE_UJ,
    limits_uw: dict[str, int] | None = None,
) -> Path:
    """Adds a powercap zone, for example "intel-rapl:0:0", and returns the file of its counter."""
    folder = root / "sys/class/powercap" / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    if range_uj is not None:
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    for file, limit_uw in (limits_uw or {}).items():
        (folder / f"constraint_0_{file}").write_text(f"{limit_uw}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    return folder / "energy_uj"


def add_cpuinfo(root: Path, *, vendor: str = "GenuineIntel", flags: str = "fpu avx2") -> None:
    """Writes a /proc/cpuinfo with two processors, the second of which is never worth reading."""
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/cpuinfo").write_text(
        f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\nbugs\t\t:\n\n"
        "processor\t: 1\nvendor_id\t: Unread\nflags\t\t: hypervisor\n\n"
    )


def add_cores(root: Path, siblings: list[str]) -> None:
    """Adds one logical processor for each list of siblings, for example "0,4"."""
    for number, text in enumerate(siblings):
        folder = root / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
