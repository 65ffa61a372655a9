"""From what the operator has chosen to an application with its models."""

from __future__ import annotations

from typing import cast

from fastapi import FastAPI
from starlette.applications import Starlette

from pocketlm.aio import AsyncModel
from pocketlm.energy import find_probe
from pocketlm.hub import check_name, find_bundle
from pocketlm.progress import Progress, silent
from pocketlm.server.answers import Service
from pocketlm.server.app import create_app
from pocketlm.server.config import ModelOptions, ServerConfig
from pocketlm.server.memory import default_budget_bytes
from pocketlm.server.model_store import ModelStore, ServedModel, served_models
from pocketlm.server.served_models import check_names


def check_models(options: ModelOptions) -> None:
    """Whether `make_app` knows which models are meant: offline, nothing is fetched. Raises what
    `check_names` raises."""
    check_names(options.names, options.precision)
    if options.draft is not None:
        check_name(options.draft)


def make_app(config: ServerConfig, options: ModelOptions, progress: Progress = silent) -> FastAPI:
    """The application; models that are not in the cache are fetched first, none is loaded yet.

    Raises what `served_models`, `ModelStore` and `find_probe` raise.
    """
    models = served_models(
        options.names,
        options.precision,
        progress,
        context_length=options.context_length,
        concurrency=options.concurrency,
        cache_bytes=options.cache_bytes,
    )
    draft = None if options.draft is None else find_bundle(options.draft, progress=progress)

    async def load(model: ServedModel) -> AsyncModel:
        return await AsyncModel.load(
            model.folder,
            context_length=model.context_length,
            threads=options.threads,
            power=options.power,
            draft=draft,
            concurrency=model.concurrency,
            queue_limit=options.queue_limit,
            cache_bytes=model.cache_bytes,
            reproducible=options.reproducible,
        )

    store = ModelStore(
        models,
        load=load,
        budget_bytes=default_budget_bytes() if options.budget_bytes is None else options.budget_bytes,
        keep_alive_s=options.keep_alive_s,
    )
    return create_app(config, store, find_probe().probe)


async def load_first(app: Starlette) -> None:
    """Loads the first model, which then stays as long as if it had been used. Raises what loading raises."""
    (await cast(Service, app.state.service).store.acquire(None)).release()
