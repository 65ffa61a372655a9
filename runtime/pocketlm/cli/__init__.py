"""The command line: `pocketlm …` and `python -m pocketlm …`.

Start-up is light: this module and the commands' modules import neither ONNX Runtime nor numpy, which a
command imports when it runs. Packages above the runtime add commands through the entry point group
`pocketlm.commands`: each entry point is a function `register(app: typer.Typer) -> None`, named after the
extra that carries its packages.

Exit codes: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C, 141 for a reader that went away.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import IO, Annotated, Any

import typer
from typer.core import TyperGroup

from pocketlm.cli import chat, console, doctor, models, ps, run, serve, tune
from pocketlm.errors import MissingExtraError, PocketlmError

COMMANDS = "pocketlm.commands"
_OWN_PACKAGES = {"pocketlm", "pocketlm_models", "pocketlm_exporters", "pocketlm_benchmarks"}

_HELP = """Small language models on the device in front of you.

\b
  pocketlm run smollm2-135m "Why is the sky blue?"
  cat letter.txt | pocketlm run smollm2-135m "Summarise this letter:"
  pocketlm chat smollm2-135m
  pocketlm serve smollm2-135m
"""


def main() -> None:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        # A console that lacks a character prints a question mark for it, it does not end the answer.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        build_app()()
    finally:
        _flush()


def build_app() -> typer.Typer:
    """The whole command line, plugged-in commands included."""
    app = typer.Typer(
        name="pocketlm",
        cls=_Group,
        help=_HELP,
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global_options)
    for command in (
        run.run,
        chat.chat,
        models.pull,
        models.list_,
        models.show,
        models.rm,
        tune.tune,
        doctor.doctor,
        ps.ps,
    ):
        app.command(name=command.__name__.rstrip("_"))(command)
    # A service is set up by its environment; what runs once and answers is not.
    app.command(context_settings={"auto_envvar_prefix": serve.ENVIRONMENT})(serve.serve)
    for point in sorted(entry_points(group=COMMANDS), key=lambda point: point.name):
        _plug_in(app, point)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("pocketlm")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed, run from its source folder)"
        console.write(f"pocketlm {version}\n")
        raise typer.Exit()


def _global_options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        console.write(ctx.get_help() + "\n")
        raise typer.Exit()


def _plug_in(app: typer.Typer, point: EntryPoint) -> None:
    """Let an entry point add its commands; one that cannot is replaced by a command that says why."""
    try:
        point.load()(app)
    except Exception as error:  # a broken plug-in must not take the other commands with it
        failure = _plug_in_error(point, error)
        app.command(name=point.name, help=f"Not available: {failure}")(_raiser(failure))


def _plug_in_error(point: EntryPoint, error: Exception) -> PocketlmError:
    if _is_missing_package(error):
        return MissingExtraError(f"pocketlm {point.name}", point.name)
    package = point.dist.name if point.dist else point.module
    return PocketlmError(
        f"the command {point.name} of the package {package} could not be loaded: "
        f"{type(error).__name__}: {error}. Install or upgrade that package again."
    )


def _raiser(error: PocketlmError) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def _is_missing_package(error: BaseException) -> bool:
    """Whether somebody else's package is not installed (a missing module of ours is a bug)."""
    return isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in _OWN_PACKAGES


class _Group(TyperGroup):
    """The top-level command: the one place where an exception becomes a message and an exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            # Outside its standalone mode typer lets errors through, and returns the code of an Exit.
            result = super().main(*args, **{**options, "standalone_mode": False})
        except Exception as error:
            result = _report(error)
        sys.exit(result if isinstance(result, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.end_line()
            raise typer.Exit(console.EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(console.EXIT_BROKEN_PIPE) from None
        except ModuleNotFoundError as error:
            # A plugged-in command imports its optional packages only when it runs.
            name = ctx.invoked_subcommand
            if _is_missing_package(error) and name and entry_points(group=COMMANDS, name=name):
                raise MissingExtraError(f"pocketlm {name}", name) from error
            raise


def _report(error: Exception) -> int:
    """Say what went wrong on standard error; returns the exit code."""
    if isinstance(error, typer.Abort):
        return console.EXIT_INTERRUPTED
    if hasattr(error, "format_message"):  # typer's usage errors, wherever this version keeps their class
        return _report_usage(error)
    if os.environ.get("POCKETLM_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    if isinstance(error, PocketlmError):
        console.error(str(error))
    elif isinstance(error, MemoryError):
        console.error("there is not enough memory. Try a smaller --context-length or a smaller model.")
    elif isinstance(error, OSError) and error.strerror:
        console.error(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    else:
        console.error(
            f"unexpected {type(error).__name__}: {error}. This is a bug in pocketlm: please report it with "
            "the traceback that POCKETLM_DEBUG=1 shows."
        )
    return 1


def _report_usage(error: Any) -> int:
    console.error(error.format_message())
    context = getattr(error, "ctx", None)
    if context is not None:
        console.note(f"Try: {context.command_path} --help")
    return int(error.exit_code)


def _flush() -> None:
    """Flush standard output while a reader that went away can still be met quietly."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
    except (OSError, ValueError):
        pass


def _discard(stream: IO[str]) -> None:
    # The interpreter flushes once more on its way out and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
