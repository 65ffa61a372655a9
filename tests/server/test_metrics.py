"""What a scrape says, read with Prometheus' own parsers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from pocketlm.energy import Reading
from pocketlm.generate import Completion, Timings, Usage
from pocketlm.server.metrics import Metrics, Refusal


@dataclass(frozen=True)
class Served:
    name: str


@dataclass(frozen=True)
class State:
    served: Served
    loaded: bool = False
    running: int = 0
    waiting: int = 0
    memory_bytes: int | None = None


@dataclass
class Store:
    these: list[State] = field(default_factory=lambda: [State(Served("tiny")), State(Served('odd "name"\n'))])
    busy_s: float = 0.0

    def states(self) -> Sequence[State]:
        return self.these


def completion(**changes: Any) -> Completion:
    timings = Timings(0.02, 0.1, 0.9, 0.3, 1.2, 100.0, 10.0, 8, 3, 0.5)
    whole = Completion("ten", tuple(range(10)), "stop", Usage(12, 2, 10), timings)
    return replace(whole, **changes)


NOTHING = completion(
    token_ids=(),
    finish_reason="cancelled",
    usage=Usage(12, 0, 0),
    timings=Timings(0.0, 0.0, 0.0, 0.0, 0.0, None, None),
)
READING = Reading("rapl", "package", "measured", 2.0, 7.5)


class Scrape:
    """The samples of a scrape by name and labels."""

    def __init__(self, metrics: Metrics) -> None:
        content, content_type = metrics.render()
        assert content_type.startswith("text/plain; version=0.0.4")
        self.families = {each.name: each for each in text_string_to_metric_families(content.decode())}
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.samples.get((f"pocketlm_{name}", frozenset(labels.items())))

    def names(self, label: str) -> set[str]:
        """The values that a label takes."""
        return {dict(labels)[label] for _, labels in self.samples if label in dict(labels)}


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def metrics(store: Store) -> Metrics:
    return Metrics(store)


def test_an_answer(metrics: Metrics) -> None:
    metrics.answered("/v1/chat/completions", "tiny", [completion()], READING)
    scrape = Scrape(metrics)
    assert scrape("requests_total", api="chat", model="tiny", status="200") == 1
    kinds = ("prompt", "cached", "completion", "drafted", "accepted")
    assert [scrape("tokens_total", model="tiny", kind=kind) for kind in kinds] == [12, 2, 10, 8, 3]
    joules = scrape("energy_joules_total", model="tiny", source="rapl", scope="package", kind="measured")
    assert joules == 7.5
    sums = {
        "queue_seconds": 0.02,
        "time_to_first_token_seconds": 0.3,
        "time_per_output_token_seconds": 0.1,
        "request_duration_seconds": 1.2,
    }
    for name, seconds in sums.items():
        assert scrape(f"{name}_count", model="tiny") == 1
        assert scrape(f"{name}_sum", model="tiny") == pytest.approx(seconds)
    assert scrape("time_to_first_token_seconds_bucket", model="tiny", le="0.25") == 0
    assert scrape("time_to_first_token_seconds_bucket", model="tiny", le="0.5") == 1


def test_several_answers_to_one_prompt(metrics: Metrics) -> None:
    longer = completion(timings=replace(completion().timings, total_s=5.0), usage=Usage(12, 10, 10))
    metrics.answered("chat", "tiny", [completion(), longer], READING)
    scrape = Scrape(metrics)
    assert scrape("requests_total", api="chat", model="tiny", status="200") == 1
    tokens = {kind: scrape("tokens_total", model="tiny", kind=kind) for kind in scrape.names("kind")}
    assert (tokens["prompt"], tokens["cached"], tokens["completion"]) == (12, 2, 20)
    assert scrape("request_duration_seconds_sum", model="tiny") == 5
    assert scrape("request_duration_seconds_count", model="tiny") == 1
    assert scrape("time_to_first_token_seconds_count", model="tiny") == 2


def test_what_was_cancelled_before_its_first_token(metrics: Metrics) -> None:
    metrics.answered("chat", "tiny", [NOTHING], READING)
    scrape = Scrape(metrics)
    assert scrape("requests_total", api="chat", model="tiny", status="499") == 1
    for name in ("queue", "time_to_first_token", "time_per_output_token", "request_duration"):
        assert scrape(f"{name}_seconds_count", model="tiny") == 0
    assert scrape("tokens_total", model="tiny", kind="completion") == 0


def test_a_single_token_has_no_time_per_token(metrics: Metrics) -> None:
    metrics.answered("chat", "tiny", [completion(token_ids=(1,), usage=Usage(12, 2, 1))], READING)
    scrape = Scrape(metrics)
    assert scrape("time_per_output_token_seconds_count", model="tiny") == 0
    assert scrape("time_to_first_token_seconds_count", model="tiny") == 1


def test_embeddings_have_no_answers(metrics: Metrics) -> None:
    metrics.answered("/v1/embeddings", "tiny", (), READING, prompt_tokens=30)
    scrape = Scrape(metrics)
    assert scrape("requests_total", api="embeddings", model="tiny", status="200") == 1
    assert scrape("tokens_total", model="tiny", kind="prompt") == 30
    assert scrape("request_duration_seconds_count", model="tiny") == 0


@pytest.mark.parametrize(
    ("reading", "unknown"),
    [
        (None, None),  # nobody asked
        (Reading("pmic", "board", "measured", 2.0, None, reason="a charger is plugged in"), 1),
        (Reading("pmic", "board", "measured", 2.0, -0.1), 1),
        (Reading("pmic", "board", "measured", 2.0, 0.0), None),
    ],
)
def test_energy_that_is_not_known(metrics: Metrics, reading: Reading | None, unknown: int | None) -> None:
    metrics.answered("chat", "tiny", [completion()], reading)
    scrape = Scrape(metrics)
    assert scrape("requests_without_energy_total", model="tiny", source="pmic") == unknown
    joules = scrape("energy_joules_total", model="tiny", source="pmic", scope="board", kind="measured")
    assert joules == (0 if reading is not None and reading.energy_j == 0 else None)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (503, "queue_full", "queue_full"),
        (503, "draining", "draining"),
        (503, None, "unavailable"),
        (401, None, "unauthorized"),
        (413, "whatever", "too_large"),
        (400, "queue_full", None),  # it was let in
        (500, None, None),
    ],
)
def test_requests_that_fail(metrics: Metrics, status: int, code: str | None, reason: str | None) -> None:
    metrics.failed("/v1/chat/completions", None, status, code=code)
    metrics.failed("/v1/chat/completions", "tiny", status, code=code)
    scrape = Scrape(metrics)
    assert scrape("requests_total", api="chat", model="", status=str(status)) == 1
    assert scrape("requests_total", api="chat", model="tiny", status=str(status)) == 1
    refused = {each: scrape("refused_total", reason=each) for each in get_args(Refusal)}
    assert refused == {each: 2 if each == reason else 0 for each in get_args(Refusal)}


def test_what_was_refused_at_the_door(metrics: Metrics) -> None:
    metrics.refused("unauthorized")
    assert Scrape(metrics)("refused_total", reason="unauthorized") == 1
    assert "api" not in {label for _, labels in Scrape(metrics).samples for label, _ in labels}


def test_clients_cannot_make_up_series(metrics: Metrics) -> None:
    for number in range(50):
        metrics.failed(f"/v1/{number}", f"model-{number}", 404)
        metrics.answered(f"/{number}", f"model-{number}", [completion()], READING)
    scrape = Scrape(metrics)
    assert scrape.names("model") == {"tiny", 'odd "name"\n', "other"}
    assert scrape.names("api") == {"other"}
    assert scrape("requests_total", api="other", model="other", status="404") == 50


def test_models(store: Store, metrics: Metrics) -> None:
    store.these[0] = State(Served("tiny"), loaded=True, running=3, waiting=2, memory_bytes=1 << 28)
    store.busy_s = 12.5
    scrape = Scrape(metrics)
    assert scrape("requests_running", model="tiny") == 3
    assert scrape("requests_waiting", model="tiny") == 2
    assert scrape("model_loaded", model="tiny") == 1
    assert scrape("model_memory_bytes", model="tiny") == 1 << 28
    assert scrape("model_loaded", model='odd "name"\n') == 0
    assert scrape("model_memory_bytes", model='odd "name"\n') == 0
    assert scrape("engine_busy_seconds_total") == 12.5


def test_every_series_of_a_model_is_there_from_the_start(metrics: Metrics) -> None:
    scrape = Scrape(metrics)
    assert scrape("tokens_total", model="tiny", kind="accepted") == 0
    assert scrape("request_duration_seconds_bucket", model="tiny", le="+Inf") == 0


def test_names_follow_the_conventions(metrics: Metrics) -> None:
    metrics.answered("chat", "tiny", [completion()], READING)
    families = Scrape(metrics).families
    assert all(family.documentation for family in families.values())
    assert {"pocketlm_build_info", "pocketlm_requests"} <= families.keys()
    ours = {name: each for name, each in families.items() if not name.endswith(("_created", "_info"))}
    for name, family in ours.items():
        assert name.startswith(("pocketlm_", "process_"))
        if family.type == "counter":
            assert all(sample.name == f"{name}_total" for sample in family.samples)
        if family.type == "histogram":
            assert name.endswith("_seconds")


def test_openmetrics_where_it_is_asked_for(metrics: Metrics) -> None:
    metrics.answered("chat", "tiny", [completion()], READING)
    prometheus = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3"
    for accept in (prometheus, "application/openmetrics-text; version=abc"):
        content, content_type = metrics.render(accept)
        assert content_type.startswith("application/openmetrics-text; version=1.0.0")
        assert content.endswith(b"# EOF\n")
        families = list(openmetrics_parser.text_string_to_metric_families(content.decode()))
        (requests,) = [each for each in families if each.name == "pocketlm_requests"]
        assert ("pocketlm_requests_total", 1.0) in [(each.name, each.value) for each in requests.samples]
    for accept in (None, "", "*/*", "text/html", "text/plain; version=nonsense"):
        assert metrics.render(accept)[1].startswith("text/plain; version=0.0.4")


def test_servers_do_not_share_counts(store: Store) -> None:
    before = {each.name for each in REGISTRY.collect()}
    one, other = Metrics(store), Metrics(store)
    one.answered("chat", "tiny", [completion()], READING)
    assert Scrape(other)("tokens_total", model="tiny", kind="prompt") == 0
    assert {each.name for each in REGISTRY.collect()} == before
