"""A comparison of two results as sections."""

from __future__ import annotations

from pocketlm.cli.console import count
from pocketlm_benchmarks.compare import ALL, ENERGY, Change, Comparison
from pocketlm_benchmarks.reports.formatting import METRICS, number, of_figure, size
from pocketlm_benchmarks.reports.layout import EMPTY, NONE, Cell, Column, Section, Table, pairs

REGRESSION = "regression"
"""Stands for the verdict of a change that is one."""

_WHOLE = "model"  # what belongs to no case
_NAMES = {"load_s": "load s", "peak_bytes": "peak memory", "kl_mean": "KL to fp32", ENERGY: "J per query"}
_LEAST_P = 0.001
_NAMED = 3  # regressions that the last sentence names; the table shows all


def comparison_sections(comparison: Comparison) -> list[Section]:
    """What was compared, the reservations, the changes and what could not be compared."""
    found = [
        Section(
            "Results",
            tables=(pairs("Results", {"Before": comparison.before, "After": comparison.after}),),
        ),
        Section("What to know", points=comparison.notes),
        Section("Changes of pocketlm", tables=(_table(comparison),)),
        Section("Not comparable", points=tuple(_reason(c) for c in comparison.changes if c.better is None)),
    ]
    return [section for section in found if not section.empty]


def conclusion(comparison: Comparison) -> str:
    """One sentence to end with."""
    limit = f"{comparison.tolerance * 100:g} %"
    regressions = comparison.regressions
    if regressions:
        names = [f"{change.case or _WHOLE} {_metric(change)}" for change in regressions[:_NAMED]]
        more = f" and {len(regressions) - _NAMED} more" if len(regressions) > _NAMED else ""
        return f"{count(len(regressions), 'regression')} beyond {limit}: {', '.join(names)}{more}."
    if not comparison.comparable:
        return "No case could be compared: that there is no regression means nothing."
    return f"No regression beyond {limit}."


def _table(comparison: Comparison) -> Table:
    columns = (
        Column("case", number=False),
        Column("metric", number=False),
        Column("before"),
        Column("after"),
        Column("times better"),
        Column("p", optional=True),
        Column("verdict", number=False),
    )
    cases = list(dict.fromkeys(change.case for change in comparison.changes))
    changes = sorted(comparison.changes, key=lambda change: cases.index(change.case))
    rows = tuple(_row(change) for change in changes if change.better is not None)
    notes = (
        "Times better: above 1.00× the second result is faster or takes less, with its 95 % interval. "
        "p: corrected for the number of tests; – where there are no samples to test.",
    )
    return Table("Changes of pocketlm", columns, rows, notes)


def _row(change: Change) -> tuple[Cell, ...]:
    verdict = REGRESSION if change.regression else change.verdict
    return (
        Cell(change.case or _WHOLE),
        Cell(_metric(change)),
        Cell(_value(change.metric, change.before)),
        Cell(_value(change.metric, change.after)),
        of_figure(change.better, "×"),
        EMPTY if change.p is None else Cell(f"<{_LEAST_P}" if change.p < _LEAST_P else f"{change.p:.3f}"),
        Cell(verdict),
    )


def _metric(change: Change) -> str:
    if change.metric in _NAMES:
        return _NAMES[change.metric]
    metric = METRICS.get(change.metric)
    return change.metric if metric is None else f"{metric.label} {metric.unit}"


def _value(metric: str, value: float | None) -> str:
    if value is None:
        return NONE
    if metric == "peak_bytes":
        return size(round(value))
    if metric == "kl_mean":
        return f"{value:.4f}"
    return number(value * (METRICS[metric].scale if metric in METRICS else 1.0))


def _reason(change: Change) -> str:
    what = change.case or _WHOLE
    return f"{what if change.metric == ALL else f'{what}, {_metric(change)}'}: {change.reason}"
