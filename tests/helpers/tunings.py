"""A tuning as another run might have left it."""

from __future__ import annotations

from pocketlm.row_costs import RowCosts
from pocketlm.tuning import ChunkTrial, Device, ThreadTrial, Tuning


def a_tuning() -> Tuning:
    """Of two cores: two threads are the fastest, one is the thriftiest."""
    return Tuning(
        graph_sha256="0" * 64,
        device=Device("Test Processor 9000", cores=2, hardware_threads=4),
        onnxruntime="1.0",
        measured_at="2026-01-02T03:04:05+00:00",
        core_share=0.99,
        threads=2,
        eco_threads=1,
        prefill_chunk=64,
        row_costs=RowCosts((1, 8), (0,), ((0.010, 0.014),)),
        eco_row_costs=RowCosts((1, 8), (0,), ((0.015, 0.030),)),
        thread_trials=(
            ThreadTrial(1, 0, 0.002, 0.015, 0.002, 0.015),
            ThreadTrial(2, 0, 0.001, 0.016, 0.002, 0.024),
            ThreadTrial(2, 50, 0.001, 0.010, 0.002, 0.020),
        ),
        chunk_trials=(ChunkTrial(64, 0.0008), ChunkTrial(128, 0.001)),
    )
