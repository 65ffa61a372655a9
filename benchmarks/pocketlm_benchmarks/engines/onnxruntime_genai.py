"""onnxruntime-genai on a folder that its model builder made, on the processor."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocketlm_benchmarks.engines.arrivals import trace_of
from pocketlm_benchmarks.engines.protocol import (
    EngineError,
    EngineInfo,
    EngineMissingError,
    EngineSpec,
    Query,
    Trace,
)
from pocketlm_benchmarks.engines.weight_files import bytes_of, onnx_bits

INSTALL = "pip install onnxruntime-genai"
BUILD = "python -m onnxruntime_genai.models.builder -i CHECKPOINT_FOLDER -o FOLDER -p int4 -e cpu"


class OnnxRuntimeGenAI:
    """One query goes through its Generator, several through its Engine, which answers four at a time.

    Each is answered from an empty cache, which holds just this query: by default it would be as large as
    the model's whole context, and attention slower.
    """

    def __init__(self, spec: EngineSpec) -> None:
        """Raises EngineMissingError, EngineError for another kind of folder, and what the package raises."""
        try:
            self._numpy: Any = importlib.import_module("numpy")
            self._genai: Any = importlib.import_module("onnxruntime_genai")
        except ImportError as error:
            raise EngineMissingError(f"{error}. Install it with: {INSTALL}") from None
        folder = Path(spec.weights)
        if not (folder / "genai_config.json").is_file():
            raise EngineError(f"{folder} has no genai_config.json. Make such a folder with: {BUILD}")
        if hasattr(self._genai, "disable_telemetry_events"):
            self._genai.disable_telemetry_events()
        begun = time.perf_counter()
        config = self._genai.Config(str(folder))
        options = {"intra_op_num_threads": spec.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model: Any = self._genai.Model(config)
        self._tokenizer: Any = self._genai.Tokenizer(self._model)
        load_s = time.perf_counter() - begun
        self._engine: Any = None
        settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        graph = folder / settings["model"]["decoder"]["filename"]
        self.info = EngineInfo(
            name="onnxruntime-genai",
            version=importlib.metadata.version("onnxruntime-genai"),
            precision=onnx_bits(graph),
            weight_bytes=bytes_of(folder.glob(f"{graph.name}*")),
            load_s=load_s,
            sampling_included=True,
            note="the cache is as large as the query; several queries in static batches of four",
        )

    def answer(self, queries: Sequence[Query]) -> list[Trace]:
        return [self._generate(queries[0])] if len(queries) == 1 else self._batch(queries)

    def close(self) -> None:
        del self._engine, self._tokenizer, self._model  # in this order, or the library complains of leaks

    def _generate(self, query: Query) -> Trace:
        length = len(query.prompt_ids) + query.new_tokens
        handed_over_s = time.perf_counter()
        parameters = self._genai.GeneratorParams(self._model)
        # At this least length no end of text is chosen before it.
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(self._ids(query))
        answer = _Answer(query, handed_over_s, self._tokenizer.create_stream())
        while not generator.is_done():
            generator.generate_next_token()
            answer.add(int(generator.get_next_tokens()[0]))
        return answer.trace()

    def _batch(self, queries: Sequence[Query]) -> list[Trace]:
        engine = self._started_engine()
        handed_over_s = time.perf_counter()
        requests = [self._request(engine, query) for query in queries]
        answers = [_Answer(query, handed_over_s, self._tokenizer.create_stream()) for query in queries]
        events = engine.create_event_buffer(len(queries))
        try:
            while engine.has_pending_requests():
                for event in engine.run(events):
                    if event.error_code != self._genai.EngineErrorCode.NONE:
                        raise EngineError(f"onnxruntime-genai gave up on a query: {event.error_code}")
                    if event.token is not None:
                        answers[requests.index(event.request)].add(event.token)
        finally:
            for request in requests:
                request.close()
        return [answer.trace() for answer in answers]

    def _started_engine(self) -> Any:
        if not hasattr(self._genai, "TurnOptions"):
            raise EngineMissingError(
                f"onnxruntime-genai {self.info.version} cannot answer several queries at once here; "
                f"0.18 or newer can: {INSTALL} --upgrade"
            )
        if self._engine is None:
            self._engine = self._genai.Engine(self._model)
        return self._engine

    def _request(self, engine: Any, query: Query) -> Any:
        options = self._genai.RequestOptions()
        options.set_max_session_tokens(len(query.prompt_ids) + query.new_tokens)
        request = engine.create_request(options=options)
        turn = self._genai.TurnOptions(request)
        turn.set_do_sample(False)
        turn.set_min_generated_tokens(query.new_tokens)
        turn.set_max_generated_tokens(query.new_tokens)
        request.begin_turn(self._ids(query), turn)
        return request

    def _ids(self, query: Query) -> Any:
        return self._numpy.array(query.prompt_ids, dtype=self._numpy.int32)


class _Answer:
    """The tokens of one query as they come; `stream` turns each into text."""

    def __init__(self, query: Query, handed_over_s: float, stream: Any) -> None:
        self._query = query
        self._handed_over_s = handed_over_s
        self._stream = stream
        self._arrivals_s: list[float] = []
        self._text = ""

    def add(self, token_id: int) -> None:
        self._text += self._stream.decode(token_id)
        self._arrivals_s.append(time.perf_counter())

    def trace(self) -> Trace:
        return trace_of(
            self._query, handed_over_s=self._handed_over_s, arrivals_s=self._arrivals_s, text=self._text
        )
