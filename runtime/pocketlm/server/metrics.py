"""What the server counts, for Prometheus.

Each server has a registry of its own. Labels take few values: `model` is one of the store's names, `api` one
of `APIS`. Names follow Prometheus' conventions (base units, `_total`), and the histograms' bounds suit small
models on processors.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from pocketlm.energy import Reading
from pocketlm.generate import Completion

APIS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/embeddings": "embeddings",
    "/v1/models": "models",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "count_tokens",
    "/api/chat": "ollama_chat",
    "/api/generate": "ollama_generate",
    "/api/embed": "ollama_embed",
    "/api/embeddings": "ollama_embed",
    "/api/tags": "ollama_models",
    "/api/show": "ollama_models",
    "/api/ps": "ollama_models",
    "/tokenize": "tokenize",
    "/detokenize": "tokenize",
    "/apply-template": "tokenize",
}
"""The label `api` of a path. Whatever else a client asks for is "other", so that it cannot make up series."""

Refusal = Literal[
    "unauthorized",
    "forbidden",
    "timeout",
    "too_large",
    "too_many",
    "queue_full",
    "model_unavailable",
    "loading",
    "draining",
    "unavailable",
]
_REFUSAL_OF_STATUS: dict[int, Refusal] = {
    401: "unauthorized",
    403: "forbidden",
    408: "timeout",
    413: "too_large",
    429: "too_many",
    503: "unavailable",
}

OK, CLIENT_GONE, ERROR = 200, 499, 500  # the second is nginx's number for a client that did not wait

_QUEUE_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_TokenKind = Literal["prompt", "cached", "completion", "drafted", "accepted"]


class _Served(Protocol):
    @property
    def name(self) -> str: ...


class _State(Protocol):
    """What is asked of a `ModelState`."""

    @property
    def served(self) -> _Served: ...
    @property
    def loaded(self) -> bool: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def memory_bytes(self) -> int | None: ...


class _Store(Protocol):
    """What is asked of a `ModelStore`."""

    def states(self) -> Sequence[_State]: ...

    @property
    def busy_s(self) -> float: ...


class Metrics:
    """Counts of one server. The event loop's thread writes and renders them."""

    def __init__(self, store: _Store) -> None:
        self._models = frozenset(state.served.name for state in store.states())
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_StoreCollector(store))
        build = Info("pocketlm_build", "Versions of what serves.", registry=registry)
        build.info(
            {
                "version": importlib.metadata.version("pocketlm"),
                "onnxruntime": importlib.metadata.version("onnxruntime"),
                "python": platform.python_version(),
            }
        )

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"pocketlm_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, bounds: Sequence[float]) -> Histogram:
            return Histogram(f"pocketlm_{name}", what, ["model"], buckets=bounds, registry=registry)

        self._requests = counter(
            "requests_total", "Requests that have ended, by HTTP status.", "api", "model", "status"
        )
        self._refused = counter("refused_total", "Requests that were not let in, or not now.", "reason")
        self._tokens = counter(
            "tokens_total",
            "Tokens of prompts (some of them cached) and of answers; drafts of speculation (some accepted).",
            "model",
            "kind",
        )
        self._energy = counter(
            "energy_joules_total", "What requests have used.", "model", "source", "scope", "kind"
        )
        self._without_energy = counter(
            "requests_without_energy_total", "Requests whose energy could not be told.", "model", "source"
        )
        self._queue_s = histogram("queue_seconds", "From a request to the beginning of its answer.", _QUEUE_S)
        self._first_token_s = histogram(
            "time_to_first_token_seconds", "From a request to its answer's first token.", _FIRST_TOKEN_S
        )
        self._token_s = histogram(
            "time_per_output_token_seconds", "Mean of an answer, behind its first token.", _TOKEN_S
        )
        self._request_s = histogram(
            "request_duration_seconds", "From a request to its answer's last token.", _REQUEST_S
        )
        self._show_zeros()

    def answered(
        self,
        api: str,
        model: str,
        completions: Sequence[Completion],
        reading: Reading | None,
        *,
        prompt_tokens: int | None = None,
        status: int | None = OK,
    ) -> None:
        """A request that a model has worked on, however it ended; one that was cancelled has the status 499.
        Without a status the request itself is not counted: `failed` does that.

        api: a path, or its label. completions: all answers to one prompt; none for embeddings, whose
        `prompt_tokens` are given. reading: of all of them together.
        """
        name = self._known(model)
        cancelled = any(each.finish_reason == "cancelled" for each in completions)
        if status is not None:
            self._count(api, name, CLIENT_GONE if cancelled and status == OK else status)
        self._count_tokens(name, completions, prompt_tokens)
        for each in completions:
            self._observe(name, each)
        # The longest: the others have ended before.
        if any(each.token_ids for each in completions):
            self._request_s.labels(name).observe(max(each.timings.total_s for each in completions))
        if reading is not None:
            self._count_energy(name, reading)

    def failed(self, api: str, model: str | None, status: int, *, code: str | None = None) -> None:
        """A request that got an error instead, or none of the service. `code` is `ApiError.code`, which tells
        more of why it was refused."""
        self._count(api, "" if model is None else self._known(model), status)
        if status in _REFUSAL_OF_STATUS:
            known = [each for each in get_args(Refusal) if each == code]
            self.refused(known[0] if known else _REFUSAL_OF_STATUS[status])

    def refused(self, reason: Refusal) -> None:
        """A request that did not get as far as an API; `failed` counts the others."""
        self._refused.labels(reason).inc()

    def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """The answer to a scrape and its content type: OpenMetrics where the header `Accept` names it, else
        Prometheus' own text format."""
        # Not the header itself: the client's parser raises ValueError for some.
        openmetrics = "application/openmetrics-text"
        encode, content_type = choose_encoder(openmetrics if openmetrics in (accept or "") else "")
        return encode(self._registry), content_type

    def _show_zeros(self) -> None:
        """So that rates are right from the first request on, and a query finds what never happened."""
        for reason in get_args(Refusal):
            self._refused.labels(reason)
        for model in self._models:
            for kind in get_args(_TokenKind):
                self._tokens.labels(model, kind)
            for histogram in (self._queue_s, self._first_token_s, self._token_s, self._request_s):
                histogram.labels(model)

    def _known(self, model: str) -> str:
        return model if model in self._models else "other"

    def _count(self, api: str, model: str, status: int) -> None:
        label = APIS.get(api) or (api if api in APIS.values() else "other")
        self._requests.labels(label, model, str(status)).inc()

    def _count_tokens(self, model: str, completions: Sequence[Completion], prompt_tokens: int | None) -> None:
        # Several answers share one prompt, and it is cached for all but the first.
        usage = completions[0].usage if completions else None
        counts: dict[_TokenKind, int] = {
            "prompt": usage.prompt_tokens if usage is not None else prompt_tokens or 0,
            "cached": usage.cached_tokens if usage is not None else 0,
            "completion": sum(each.usage.completion_tokens for each in completions),
            "drafted": sum(each.timings.drafted_tokens for each in completions),
            "accepted": sum(each.timings.accepted_tokens for each in completions),
        }
        for kind, count in counts.items():
            self._tokens.labels(model, kind).inc(count)

    def _observe(self, model: str, completion: Completion) -> None:
        times, count = completion.timings, completion.usage.completion_tokens
        if not count:  # it was cancelled before: what was waited for did not come
            return
        self._queue_s.labels(model).observe(times.queue_s)
        self._first_token_s.labels(model).observe(times.ttft_s)
        if count > 1:
            self._token_s.labels(model).observe(times.decode_s / (count - 1))

    def _count_energy(self, model: str, reading: Reading) -> None:
        # A counter cannot fall, although a board's rail may feed back for a moment.
        if reading.energy_j is None or reading.energy_j < 0:
            self._without_energy.labels(model, reading.source).inc()
        else:
            self._energy.labels(model, reading.source, reading.scope, reading.kind).inc(reading.energy_j)


_GAUGES: tuple[tuple[str, str, Callable[[_State], int]], ...] = (
    ("requests_running", "Requests under way.", lambda state: state.running),
    ("requests_waiting", "Requests that wait for their turn.", lambda state: state.waiting),
    ("model_loaded", "Whether the model is in memory.", lambda state: int(state.loaded)),
    (
        "model_memory_bytes",
        "What the model may grow to; 0 while it is not loaded.",
        lambda state: state.memory_bytes or 0,
    ),
)


class _StoreCollector(Collector):
    """What the store says at the moment of a scrape."""

    def __init__(self, store: _Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "pocketlm_engine_busy_seconds", "Seconds that engines have computed.", self._store.busy_s
        )
        states = self._store.states()
        for name, what, value in _GAUGES:
            family = GaugeMetricFamily(f"pocketlm_{name}", what, labels=["model"])
            for state in states:
                family.add_metric([state.served.name], value(state))
            yield family
