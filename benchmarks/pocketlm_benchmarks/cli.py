"""`pocketlm bench`: a model's latency, energy and quality on this device, beside its peers.

Exit codes are those of the command line, and 3 for a regression that `compare` finds.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pocketlm.cli import console
from pocketlm.errors import InvalidSettingError, StorageError

if TYPE_CHECKING:
    from pocketlm_benchmarks.result import Result

EXIT_REGRESSION = 3

_MODEL = "model"  # the command that `pocketlm bench MODEL` stands for
_ARGUMENTS = "pocketlm_benchmarks.arguments"
_STDOUT = "-"

_EPILOG = """Also: pocketlm bench compare BEFORE.json AFTER.json, pocketlm bench report RESULT.json …,
pocketlm bench join RESULT.json --meter LOG.csv; each with --help."""

JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output."),
]
HtmlOption = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write one page with plots, complete in itself.")
]
MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="Write Markdown; - for standard output.")
]
CsvOption = Annotated[
    Path | None,
    typer.Option("--csv", metavar="FILE", help="Write a row for each figure; - for standard output."),
]


class _BenchGroup(TyperGroup):
    """`bench MODEL` measures; `bench compare`, `report` and `join` work on results."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = args
        if not args or args[0] not in self.commands:
            args = [_MODEL, *args]
        return list(super().parse_args(ctx, args))


def register(app: typer.Typer) -> None:
    """Adds the commands; called through the entry point group `pocketlm.commands`."""
    group = typer.Typer(cls=_BenchGroup, rich_markup_mode=None)
    group.command(name=_MODEL, epilog=_EPILOG)(bench)
    for command in (compare, report, join):
        group.command(name=command.__name__)(command)
    app.add_typer(group, name="bench", help="Measure a model's latency, energy and quality on this device.")


def bench(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for run.", show_default=False)],
    precision: Annotated[str | None, typer.Option(help="As for run.", show_default=False)] = None,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="N[,N…]", help="Prompt lengths of the prefill cases; none for none.")
    ] = "512",
    new_tokens: Annotated[int, typer.Option(help="Tokens that the decode cases generate.")] = 128,
    depth: Annotated[
        str,
        typer.Option(metavar="N[,N…]", help="Tokens of context behind which they decode; none for none."),
    ] = "0,512",
    workload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Real prompts: chat, summarize, extract, code-edit, retrieval, batch; all or none. May be "
            "given several times. Default: chat.",
            show_default=False,
        ),
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Rounds, each with every case on every engine.")] = 10,
    threads: Annotated[
        int | None, typer.Option(help="Threads. Default: the physical cores.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts and the order.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="3 rounds, short blocks and no energy: for a first look.")
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PEER=WEIGHTS[,…]",
            help="Measure peers too, in alternation: llama.cpp=FILE.gguf, llama-bench=FILE.gguf, "
            "onnxruntime-genai=FOLDER, openvino=FOLDER, transformers=FOLDER, optimum=FOLDER, "
            "server=URL#MODEL.",
            show_default=False,
        ),
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PEER=PYTHON",
            help="Run a peer with this interpreter, of the environment that it is installed in.",
            show_default=False,
        ),
    ] = None,
    llama_bench: Annotated[
        str | None, typer.Option(metavar="PATH", help="The llama-bench program.", show_default=False)
    ] = None,
    quality: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            help="Measure perplexity, KL and top-1 against fp32 on this file.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="The fp32 bundle for --quality. Default: the model's.", show_default=False
        ),
    ] = None,
    sustain: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION", help="Then decode without a pause: 90s, 10m, 1h.", show_default=False
        ),
    ] = None,
    energy: Annotated[
        bool, typer.Option("--energy/--no-energy", help="Measure or estimate joules; blocks last longer.")
    ] = True,
    meter: Annotated[
        Path | None,
        typer.Option(
            metavar="LOG.csv",
            help="An external meter's log of timestamps and watts, written meanwhile.",
            show_default=False,
        ),
    ] = None,
    cross_check: Annotated[
        bool, typer.Option("--cross-check", help="Show codecarbon's figure for the run beside ours.")
    ] = False,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
    markdown_file: MarkdownOption = None,
    csv_file: CsvOption = None,
) -> None:
    """Measure latency, energy, memory and quality of MODEL on this device, beside peers if asked."""
    from pocketlm_benchmarks.engines.registry import parse_against
    from pocketlm_benchmarks.harness import Options, bench
    from pocketlm_benchmarks.sustain import parse_duration

    outputs = _Outputs(json_file, html_file, markdown_file, csv_file)
    options = Options(
        precision=precision,
        prompt_tokens=_sizes("--prompt-tokens", prompt_tokens),
        new_tokens=new_tokens,
        depths=_sizes("--depth", depth),
        workloads=_workloads(workload),
        peers=tuple(peer for item in against or () for peer in parse_against(item)),
        peer_pythons=dict(_pair("--peer-python", item) for item in peer_python or ()),
        llama_bench=llama_bench,
        rounds=min(repetitions, 3) if quick else repetitions,
        threads=threads,
        seed=seed,
        quick=quick,
        energy=energy and not quick,
        meter_log=meter,
        cross_check=cross_check,
        quality_text=quality,
        reference=reference,
        sustain_s=None if sustain is None else parse_duration(sustain),
        command=shlex.join(["pocketlm", "bench", *map(_without_folders, ctx.meta.get(_ARGUMENTS, []))]),
    )
    with console.progress() as progress:
        result = bench(model, options, progress=progress)
    outputs.write([result])


def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE.json", show_default=False)],
    after: Annotated[Path, typer.Argument(metavar="AFTER.json", show_default=False)],
    tolerance: Annotated[
        str,
        typer.Option(metavar="PERCENT", help="A significant loss beyond it is a regression: exit code 3."),
    ] = "5%",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare two results: what changed, and is that more than chance?"""
    import dataclasses

    from pocketlm_benchmarks.compare import compare
    from pocketlm_benchmarks.reports.terminal import print_comparison
    from pocketlm_benchmarks.result import read_result

    comparison = compare(read_result(before), read_result(after), tolerance=_share(tolerance))
    if as_json:
        console.write_json(dataclasses.asdict(comparison))
    else:
        print_comparison(comparison)
    if comparison.regressions:
        raise typer.Exit(EXIT_REGRESSION)
    if not comparison.comparable:
        raise typer.Exit(1)  # or a check would pass that has checked nothing


def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json…", show_default=False)],
    html_file: HtmlOption = None,
    markdown_file: MarkdownOption = None,
    csv_file: CsvOption = None,
) -> None:
    """Show results again, one beside the other: as a table, a page, Markdown or CSV."""
    from pocketlm_benchmarks.result import read_result

    outputs = _Outputs(None, html_file, markdown_file, csv_file)
    outputs.write([read_result(path) for path in results])


def join(
    result: Annotated[Path, typer.Argument(metavar="RESULT.json", show_default=False)],
    meter: Annotated[
        Path,
        typer.Option(metavar="LOG.csv", help="The meter's log of timestamps and watts.", show_default=False),
    ],
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
    markdown_file: MarkdownOption = None,
    csv_file: CsvOption = None,
) -> None:
    """Put an external meter's log in place of a result's own energy figures."""
    from pocketlm_benchmarks.join import join
    from pocketlm_benchmarks.result import read_result

    outputs = _Outputs(json_file, html_file, markdown_file, csv_file)
    outputs.write([join(read_result(result), meter)])


class _Outputs:
    """Where results go. Checked before anything is measured, so that no hour's work is lost at its end."""

    def __init__(
        self,
        json_file: Path | None,
        html_file: Path | None,
        markdown_file: Path | None,
        csv_file: Path | None,
    ) -> None:
        self._json = json_file
        self._files = {"html": html_file, "markdown": markdown_file, "csv": csv_file}
        given = [path for path in (json_file, *self._files.values()) if path is not None]
        if sum(map(_is_stdout, given)) > 1:
            raise InvalidSettingError("only one kind of output can go to standard output.")
        self._table = not any(map(_is_stdout, given))
        files = [path.absolute() for path in given if not _is_stdout(path)]
        for path in files:
            if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
                raise StorageError(
                    f"{path} cannot be written: a file in a folder that you may write to is expected."
                )
            if files.count(path) > 1:
                raise InvalidSettingError(f"{path} is named for two outputs; each needs a file of its own.")

    def write(self, results: Sequence[Result]) -> None:
        """Writes all of them, whatever becomes of one; then raises the first error."""
        failures: list[Exception] = []
        for write in self._writers(results):
            try:
                write()
            except Exception as error:  # whatever it is, the others hold an hour's work
                failures.append(error)
        if failures:
            raise failures[0]

    def _writers(self, results: Sequence[Result]) -> Iterator[Callable[[], None]]:
        from pocketlm_benchmarks.reports.html import to_html
        from pocketlm_benchmarks.reports.markdown import to_markdown
        from pocketlm_benchmarks.reports.table import to_csv
        from pocketlm_benchmarks.reports.terminal import print_result
        from pocketlm_benchmarks.result import to_json, write_result

        # What takes no rendering first: it holds everything.
        if (json_file := self._json) is not None:
            if _is_stdout(json_file):
                yield lambda: console.write_json(to_json(results[0]))
            else:
                yield lambda: write_result(results[0], json_file)
        for kind, render in (("html", to_html), ("markdown", to_markdown), ("csv", to_csv)):
            path = self._files[kind]
            if path is not None:
                yield partial(_write, render, results, path)
        if self._table:
            for result in results:
                yield partial(print_result, result)


def _write(render: Callable[[Sequence[Result]], str], results: Sequence[Result], path: Path) -> None:
    from pocketlm.files import atomic_write

    if _is_stdout(path):
        console.write(render(results))
    else:
        atomic_write(path, render(results))


def _is_stdout(path: Path) -> bool:
    return str(path) == _STDOUT


def _without_folders(argument: str) -> str:
    """The argument with names instead of absolute paths, which are nobody's business and of use to nobody."""
    from pocketlm_benchmarks.engines.registry import split_peers

    return ",".join(map(_name_only, split_peers(argument)))


def _name_only(text: str) -> str:
    option, separator, value = text.partition("=")
    for path, before in ((text, ""), (value, option + separator)):
        if Path(path).is_absolute():
            return before + Path(path).name
    return text


def _sizes(option: str, text: str) -> tuple[int, ...]:
    if text.strip() in ("", "none"):
        return ()
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError:
        raise InvalidSettingError(
            f"{option} is {text!r}; whole numbers with commas between them are expected: 128,512."
        ) from None


def _workloads(names: Sequence[str] | None) -> tuple[str, ...] | None:
    from pocketlm_benchmarks.workloads import workload_names

    if names is None:
        return None
    if "all" in names:
        return workload_names()
    return tuple(dict.fromkeys(name for name in names if name != "none"))


def _pair(option: str, text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise InvalidSettingError(f"{option} is {text!r}; PEER=VALUE is expected.")
    return name, value


def _share(text: str) -> float:
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise InvalidSettingError(f"--tolerance is {text!r}; per cents from 0 to below 100 are expected: 5%.")
    return share
