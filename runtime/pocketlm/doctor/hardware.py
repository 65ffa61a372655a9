"""The processor, the threads that answers are computed with, the memory and how fast it is read."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator

from pocketlm.bandwidth import read_rate
from pocketlm.bundle import Bundle
from pocketlm.cache import bundles_folder
from pocketlm.device import Machine, describe_machine, memory
from pocketlm.doctor.check import Check, State
from pocketlm.files import readable_size
from pocketlm.power import power
from pocketlm.progress import Progress, silent
from pocketlm.threads import THREADS_VARIABLE, hardware_threads, physical_cores, wanted_threads
from pocketlm.tuning import find_tuning

LITTLE_MEMORY = 1 << 30

_NAMES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "VNNI",
    "avx512_vnni": "VNNI",
    "amx_int8": "AMX",
    "asimd": "NEON",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "SVE",
    "sme": "SME",
}


def processor() -> Iterator[Check]:
    """The system, the processor's name and what its instruction sets mean."""
    machine = describe_machine()
    host = {None: "", "unknown": ", a virtual machine"}.get(
        machine.virtual_machine, f", a virtual machine ({machine.virtual_machine})"
    )
    yield Check("system", "ok", machine.system)
    yield Check(
        "processor",
        "ok",
        f"{machine.processor} ({machine.architecture}{host})",
        facts={
            "processor": machine.processor,
            "architecture": machine.architecture,
            "system": machine.system,
            "virtual_machine": machine.virtual_machine,
        },
    )
    state, text = meaning(machine)
    yield Check("features", state, text, facts={"features": list(machine.features)})


def meaning(machine: Machine, platform: str = sys.platform) -> tuple[State, str]:
    """What the instruction sets do for models."""
    features = set(machine.features)
    names = ", ".join(dict.fromkeys(name for feature, name in _NAMES.items() if feature in features))
    if machine.architecture == "x86_64":
        state, text = _x86_meaning(features, platform)
    elif machine.architecture == "arm64":
        state, text = _arm_meaning(features)
    else:
        state, text = "note", "what this processor can do is not known; int8 models may be slow"
    return state, f"{names}: {text}" if names else text


def _x86_meaning(features: set[str], platform: str) -> tuple[State, str]:
    if "amx_int8" in features:
        return "ok", "int8 models run at full speed, long prompts above all"
    if features & {"avx512_vnni", "avx_vnni"}:
        return "ok", "int8 models run at full speed"
    if platform == "win32":  # it tells of no more than AVX-512
        return "ok", "whether there is VNNI or AMX, which int8 models gain from, Windows does not tell"
    if "avx2" in features:
        return "ok", "without VNNI, int8 products take several instructions; long prompts feel it most"
    return "note", "without AVX2 all products are slow here"


def _arm_meaning(features: set[str]) -> tuple[State, str]:
    if "i8mm" in features:
        return "ok", "int8 models run at full speed"
    if "asimddp" in features:
        return "ok", "int8 models run well; i8mm would make long prompts faster"
    return "note", "without dotprod, int8 models are slow here"


def threads(bundle: Bundle | None) -> Iterator[Check]:
    """How many compute an answer, and why. Raises InvalidSettingError for a wrong POCKETLM_THREADS."""
    cores, hardware = physical_cores(), hardware_threads()
    tuning = None if bundle is None else find_tuning(bundle.manifest)
    wanted = wanted_threads()
    chosen = power("balanced", tuning=tuning).threads
    name = bundle.manifest.name if bundle else None
    if wanted is not None:
        why = f"{THREADS_VARIABLE} says so"
    elif tuning is not None:
        why = f"as pocketlm tune found for {name}"
    else:
        why = "one for each physical core that this process may use"
    remedy: str | None = None
    state: State = "ok"
    if wanted is not None and wanted > hardware:
        state = "note"
        remedy = f"More threads than run at once ({hardware}) wait for each other: lower {THREADS_VARIABLE}."
    elif wanted is None and tuning is None and bundle is not None:
        remedy = f"pocketlm tune {_to_type(bundle)} measures whether another number is faster."
    yield Check(
        "threads",
        state,
        f"{chosen}, {why}",
        remedy,
        {
            "threads": chosen,
            "eco_threads": power("eco", tuning=tuning).threads,
            "physical_cores": cores,
            "hardware_threads": hardware,
            "tuned_for": name if tuning is not None else None,
            "variable": wanted,
        },
    )


def _to_type(bundle: Bundle) -> str:
    """The name of this very bundle: a model may be here at several precisions."""
    return bundle.folder.name if bundle.folder.parent == bundles_folder() else shlex.quote(str(bundle.folder))


def free_memory() -> Iterator[Check]:
    """How much there is, and how much a model may take."""
    found = memory()
    total, available = found.total_bytes, found.available_bytes
    facts = {"total_bytes": total, "available_bytes": available}
    if total is None or available is None:
        yield Check("memory", "absent", "this system does not tell", facts=facts)
        return
    text = f"{readable_size(total)}, of which {readable_size(available)} are free"
    if available < LITTLE_MEMORY:
        remedy = "Close other programs, or use a smaller model or precision."
        yield Check("memory", "note", text, remedy, facts)
    else:
        yield Check("memory", "ok", text, facts=facts)


def bandwidth(progress: Progress = silent) -> Iterator[Check]:
    """What bounds decoding: each token reads all of the model's weights."""
    count = power("balanced").threads
    progress("Measuring how fast memory is read", 0, 1, "measurements")
    rate = read_rate(count)
    progress("Measuring how fast memory is read", 1, 1, "measurements")
    threads = "1 thread" if count == 1 else f"{count} threads"
    yield Check(
        "bandwidth",
        "ok",
        f"{rate / 1e9:.1f} GB/s read by {threads}: a model of 1 GB decodes {rate / 1e9:.0f} tokens/s "
        "at most, one of 100 MB ten times as many",
        facts={"read_bytes_per_s": rate, "threads": count},
    )
