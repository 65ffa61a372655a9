"""A process that pulls a model with the fake exporter: `python pull_process.py SOURCE FOLDER [hang]`.

Each export appends a line to FOLDER/exports. With "hang" it writes half a bundle, creates FOLDER/hanging and
never ends.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from helpers.tiny_bundle import FakeExporter
from pocketlm import hub
from pocketlm_models import CatalogueEntry, PackageSource


def main(source: str, folder: Path, hang: bool) -> None:
    def before_end(output: Path) -> None:
        with (folder / "exports").open("a") as file:
            file.write("one\n")
        if hang:
            (folder / "hanging").touch()
            time.sleep(60)
        time.sleep(0.3)  # the other process has to wait

    entry = folder / "entry.json"
    if entry.exists():
        facts = json.loads(entry.read_text())
        tiny = CatalogueEntry("tiny", "", "MIT", "int8", PackageSource(**facts))
        hub.catalogue = lambda: {"tiny": tiny}  # type: ignore[assignment]
    hub._exporter = lambda: FakeExporter(before_end)
    print(hub.pull(source))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "hang" in sys.argv[3:])
