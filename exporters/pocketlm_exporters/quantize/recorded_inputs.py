"""What linears read during calibration, kept on disk: a whole model's rows are too many for memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pocketlm_exporters.decoder import Array


class RecordedInputs:
    """The rows that linears read, by the linear's path, in files of the folder that it is given."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, path: str, rows: Array) -> None:
        """Takes in `rows` (tokens, inputs) of the linear at `path`. Raises OSError for a full disk."""
        with self._file(path).open("ab") as file:
            file.write(np.ascontiguousarray(rows, np.float32).tobytes())

    def gram(self, path: str, inputs: int) -> Array:
        """Xᵀ X (inputs, inputs) of all rows X (tokens, inputs) of the linear at `path`."""
        rows = np.fromfile(self._file(path), np.float32).reshape(-1, inputs)
        gram: Array = rows.T @ rows
        return gram

    def _file(self, path: str) -> Path:
        return self._folder / f"{path}.rows"
