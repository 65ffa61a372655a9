"""`pocketlm serve`: models behind HTTP."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import stat
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from pocketlm.cli import console, options
from pocketlm.errors import InvalidSettingError, MissingExtraError, did_you_mean
from pocketlm.quantities import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from pocketlm.network_lock import NetworkLock
    from pocketlm.progress import Progress
    from pocketlm.server.answers import Service
    from pocketlm.server.config import ModelOptions, ServerConfig
    from pocketlm.server.serve import StoppedError

T = TypeVar("T")

ENVIRONMENT = "POCKETLM"
"""Each option has a twin of this name in the environment: --max-body is POCKETLM_MAX_BODY."""

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "psutil")
LOG_LEVELS = ("debug", "info", "warning", "error")


def _usage(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser whose errors are wrong usage."""

    def checked(text: str) -> T:
        try:
            return parse(text)
        except InvalidSettingError as error:
            raise typer.BadParameter(str(error)) from None

    return checked


def _check_log_level(value: str) -> str:
    if value not in LOG_LEVELS:
        raise typer.BadParameter(
            f"{value!r} is not a level; use {', '.join(LOG_LEVELS)}.{did_you_mean(value, LOG_LEVELS)}"
        )
    return value


def _size(text: str, **given: Any) -> Any:
    return typer.Option(metavar="SIZE", parser=_usage(parse_bytes), help=text, **given)


def _duration(text: str, **given: Any) -> Any:
    return typer.Option(metavar="TIME", parser=_usage(parse_seconds), help=text, **given)


def _number(text: str, least: int, **given: Any) -> Any:
    return typer.Option(metavar="N", min=least, help=text, **given)


def serve(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="The models to serve, named as for `pocketlm run`; the first is loaded at once. Without one "
            "all that are here are served.",
            show_default=False,
            autocompletion=options.complete_model,
        ),
    ] = None,
    *,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Listen here; other than on this machine needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: any free one.")] = 8642,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Ask clients for this key.", show_default=False),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Ask clients for one of the keys in FILE, one a line."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name that the server goes by, beside localhost. Repeatable."),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Pages of https://HOST[:PORT] may call the server. Repeatable."),
    ] = None,
    max_body: Annotated[int | None, _size("The largest request (default: 4MiB).")] = None,
    max_connections: Annotated[int, _number("Requests at once, those that wait included.", 1)] = 256,
    queue_limit: Annotated[int, _number("Answers of a model that may wait for their turn.", 0)] = 64,
    concurrency: Annotated[int, _number("Answers of a model that are computed at once.", 1)] = 8,
    cache_memory: Annotated[
        int | None, _size("For conversations of a model that may go on (default: 256MiB).")
    ] = None,
    max_tokens: Annotated[
        int | None, _number("The longest answer that a request may ask for.", 1, show_default=False)
    ] = None,
    answer_timeout: Annotated[
        float | None, _duration("End answers that take longer; 0: never (default: 10m).")
    ] = None,
    memory_budget: Annotated[
        int | None, _size("For all loaded models together (default: 80% of what is free at the start).")
    ] = None,
    keep_alive: Annotated[
        float | None,
        _duration("Unload a model that nobody has used for so long; -1: never (default: 10m)."),
    ] = None,
    context_length: options.ContextLength = None,
    threads: options.Threads = None,
    power: options.Power = None,
    precision: options.PrecisionName = None,
    draft: options.DraftModel = None,
    reproducible: options.Reproducible = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts to the log, which otherwise has none.")
    ] = False,
    log_level: Annotated[
        str,
        typer.Option(metavar="LEVEL", callback=_check_log_level, help="debug, info, warning or error."),
    ] = "info",
    no_network_lock: Annotated[
        bool,
        typer.Option(
            "--no-network-lock", help="Do without the lock that keeps this process from opening connections."
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", envvar="POCKETLM_JSON", help="Print one line of JSON when the server is ready."
        ),
    ] = False,
    open_page: Annotated[
        bool, typer.Option("--open", envvar="POCKETLM_OPEN", help="Open the chat page in the browser.")
    ] = False,
) -> None:
    """Serve models to programs and to the browser.

    Programs speak OpenAI's, Anthropic's or Ollama's API to it, people use its chat page. Only this machine
    can reach it unless --host says otherwise. Each option can be set in the environment too: --max-body is
    POCKETLM_MAX_BODY.
    """
    if draft is not None and len(models or ()) != 1:
        raise typer.BadParameter("--draft is for one MODEL, whose tokenizer it shares. Name that one alone.")
    if api_key is not None and _is_on_command_line(ctx, "api_key"):
        console.note(
            "Other users of this machine can see the key of --api-key in its list of processes. Better use "
            "--api-key-file or POCKETLM_API_KEY."
        )
    _check_installed()
    from pocketlm.server.access_log import configure_logging
    from pocketlm.server.config import ModelOptions, ServerConfig

    limits = _given(max_body_bytes=max_body)
    if answer_timeout is not None:
        limits["answer_timeout_s"] = answer_timeout or None
    config = ServerConfig(
        host=host,
        port=port,
        api_keys=(*(() if api_key is None else (api_key,)), *read_keys(api_key_file)),
        allowed_hosts=tuple(allowed_host or ()),
        allowed_origins=tuple(allowed_origin or ()),
        max_connections=max_connections,
        max_tokens=max_tokens,
        log_prompts=log_prompts,
        **limits,
    )
    model_options = ModelOptions(
        names=tuple(models or ()),
        precision=precision,
        context_length=context_length,
        threads=threads,
        draft=draft,
        concurrency=concurrency,
        queue_limit=queue_limit,
        reproducible=reproducible,
        budget_bytes=memory_budget,
        **_given(power=power, cache_bytes=cache_memory, keep_alive_s=keep_alive),
    )
    configure_logging(log_level)
    run(config, model_options, locks=not no_network_lock, as_json=as_json, open_page=open_page)


def run(
    config: ServerConfig, model_options: ModelOptions, *, locks: bool, as_json: bool, open_page: bool
) -> None:
    """Serves until it is told to end, and ends the process where that is before the server was ready. Raises
    what `check_models`, `make_app` and `serve` raise."""
    from pocketlm.network_lock import lock_network
    from pocketlm.server import launch
    from pocketlm.server.addresses import elsewhere_url
    from pocketlm.server.serve import StoppedError
    from pocketlm.server.serve import serve as serve_app

    launch.check_models(model_options)
    stopping = threading.Event()
    elsewhere: list[str | None] = [None]
    phases = [""]
    services: list[Service] = []  # one, as soon as the models' files are here

    def make_app() -> Any:
        with console.progress() as progress:
            app = launch.make_app(config, model_options, _until(stopping, _noting(phases, progress)))
        services.append(app.state.service)
        return app

    def listening(url: str) -> None:
        console.note(f"Listening at {url} ...")
        elsewhere[0] = elsewhere_url(config, url)  # before the lock, which forbids asking for addresses
        if open_page:
            webbrowser.open(url)  # before the lock, which a browser would inherit

    def lock() -> None:
        services[0].network_lock = lock_network()

    def ready(url: str) -> None:
        service = services[0]
        served, network = [state.name for state in service.store.states()], service.network_lock
        if as_json:
            console.write_json(as_object(url, served, config, network), indent=None)
        console.note_rows(summary(url, served, config, network, elsewhere[0]), dim="names")

    try:
        serve_app(
            config,
            make_app,
            load=launch.load_first if model_options.names else None,
            listening=listening,
            lock=lock if locks else lambda: None,
            ready=ready,
            phase=lambda: phases[-1],
            stopping=stopping,
        )
    except StoppedError as stopped:
        _end_process(stopped)


class _StartCancelledError(Exception):
    """Ends the start of a server that is to stop."""


def _until(stopping: threading.Event, progress: Progress) -> Progress:
    """`progress` until `stopping` is set: then the work that reports is broken off."""

    def report(task: str, done: int, total: int, unit: str) -> None:
        if stopping.is_set():
            raise _StartCancelledError
        progress(task, done, total, unit)

    return report


def _noting(phases: list[str], progress: Progress) -> Progress:
    """`progress`, which leaves what it was told last in `phases`."""

    def report(task: str, done: int, total: int, unit: str) -> None:
        phases[-1] = f"{task}: {100 * done // total} %" if total else task
        progress(task, done, total, unit)

    return report


def _end_process(stopped: StoppedError) -> NoReturn:
    console.show_cursor()
    console.end_line()
    console.note(str(stopped))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + stopped.signal_number)


def as_object(url: str, models: list[str], config: ServerConfig, lock: NetworkLock | None) -> dict[str, Any]:
    """What `--json` prints when the server is ready."""
    return {
        "url": url,
        "pid": os.getpid(),
        "models": models,
        "api_key": bool(config.api_keys),
        "network_lock": None if lock is None else dataclasses.asdict(lock),
    }


def summary(
    url: str,
    models: list[str],
    config: ServerConfig,
    lock: NetworkLock | None,
    elsewhere: str | None = None,
) -> dict[str, str]:
    """What a person is told when the server is ready; `elsewhere` is its URL for other devices."""
    if config.loopback:
        key = "needed" if config.api_keys else "not needed: only this machine can connect"
    else:
        key = f"needed: other machines can connect to {config.host}"
    return {
        "Chat page": f"{url}/",
        **({} if elsewhere is None else {"Elsewhere": f"{elsewhere}/ (from other devices)"}),
        "API": "/v1 (OpenAI), / (Anthropic, Ollama)",
        "Models": ", ".join(models),
        "API key": key,
        "Network": _network(lock),
        "End": "Ctrl-C (twice: at once)",
    }


def _network(lock: NetworkLock | None) -> str:
    if lock is None:
        return "not locked, as --no-network-lock says; it connects nowhere even so"
    how = {
        "kernel": "locked by the kernel: this process cannot open connections",
        "python": f"locked for Python alone: {lock.reason}",
        "none": f"not locked: {lock.reason}",
    }[lock.kind]
    return how + (f"; opened before: {', '.join(lock.left_open)}" if lock.left_open else "")


def _given(**options: Any) -> dict[str, Any]:
    """What the operator has set; the rest has its defaults elsewhere."""
    return {name: value for name, value in options.items() if value is not None}


def _check_installed() -> None:
    if not all(importlib.util.find_spec(package) for package in _PACKAGES):
        raise MissingExtraError("pocketlm serve", "serve")


def _is_on_command_line(ctx: typer.Context, parameter: str) -> bool:
    source = ctx.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def read_keys(path: Path | None) -> list[str]:
    """The keys of a file: one a line, without empty lines and those that begin with #. Raises
    InvalidSettingError."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettingError(f"the key file {path} cannot be read: {error}.") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise InvalidSettingError(f"the key file {path} has no key. Write one on a line of its own.")
    if os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH):
        console.note(f"Other users of this machine can read the keys in {path}. Better: chmod 600 {path}")
    return keys
