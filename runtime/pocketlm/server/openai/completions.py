"""`/v1/completions`: text or token ids that the model goes on from, without a chat template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response

from pocketlm.generate import Completion, Piece
from pocketlm.server import reports
from pocketlm.server.answers import Answers, Result, Service, ServiceOf, merged, while_connected
from pocketlm.server.errors import ApiError, blaming
from pocketlm.server.event_stream import EventStream, event, json_bytes
from pocketlm.server.fields import given
from pocketlm.server.openai.fields import GenerationFields, TokenId
from pocketlm.server.openai.logprobs import completion_logprobs
from pocketlm.server.openai.usage import finish_reason, new_id, system_fingerprint, usage
from pocketlm.settings import Settings

router = APIRouter(tags=["OpenAI"])

MAX_LISTED = 2048

_Ids = Annotated[list[TokenId], Field(fail_fast=True)]


def _kind(value: object) -> str:
    """By its first item, so that what is wrong with a list is told of what it begins as."""
    if not isinstance(value, list):
        return "a text"
    first = value[0] if value else None
    if isinstance(first, int):
        return "ids"
    return "lists of ids" if isinstance(first, list) else "texts"


Texts = Annotated[
    Annotated[str, Tag("a text")]
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_LISTED), Tag("texts")]
    | Annotated[_Ids, Tag("ids")]
    | Annotated[list[_Ids], Field(fail_fast=True, max_length=MAX_LISTED), Tag("lists of ids")],
    Discriminator(_kind),
]
"""One or several; how many of them are answered depends on the server."""


class CompletionRequest(GenerationFields):
    prompt: Texts
    """a text or token ids, or a list of either: then each gets answers of its own"""
    echo: bool | None = None
    """whether the text begins with the prompt"""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Raises ApiError if there is none."""
        return separate(self.prompt, "prompt")

    def settings(self) -> Settings:
        """Raises ApiError for fields that contradict each other."""
        if self.echo and self.logprobs is not None:
            message = (
                "echo and logprobs are given; a prompt has no log-probabilities here. Leave one of them out."
            )
            raise ApiError(400, message, code="unsupported_field", param="echo")
        wanted = None if self.logprobs is None else True
        own = given(logprobs=wanted, top_logprobs=self.logprobs)
        return cast(Settings, {**self.sampling(), **own})


def separate(texts: str | Sequence[Any], field: str) -> list[str | list[int]]:
    """Each of several texts, all of them texts or all of them token ids. Raises ApiError if there is none."""
    if not texts and not isinstance(texts, str):
        raise ApiError(400, f"{field} is an empty list. Give one text at least.", param=field)
    single = isinstance(texts, str) or isinstance(texts[0], int)
    return cast(list[str | list[int]], [texts] if single else list(texts))


class Batch:
    """Answers to each of several prompts: the i-th of prompt p, from 0, is number p × n + i."""

    def __init__(self, asked: Sequence[Answers], n: int) -> None:
        self.asked = asked
        self._n = n
        self._pumps: list[asyncio.Task[None]] = []

    @classmethod
    async def ask(cls, service: Service, body: CompletionRequest) -> Batch:
        """Raises ApiError beyond the server's limits, and what `Service.ask` raises."""
        prompts, settings, n = body.prompts(), body.settings(), body.n or 1
        most = service.config.max_answers
        if len(prompts) * n > most:
            message = f"{len(prompts):,} prompts have {n:,} answers each; this server gives {most} at most."
            raise ApiError(400, message, param="prompt" if n == 1 else "n")
        asked: list[Answers] = []
        try:
            for prompt in prompts:
                answers = await service.ask("completions", body.model, prompt, n=n, raw=True, **settings)
                asked.append(answers)
        except BaseException:
            await cls(asked, n).close()
            raise
        return cls(asked, n)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        async for number, (index, piece) in merged(self.asked, self._pumps):
            yield number * self._n + index, piece

    async def finish(self) -> list[Result]:
        return list(await asyncio.gather(*(answers.finish() for answers in self.asked)))

    async def close(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        closing = (answers.close() for answers in self.asked)
        for failed in await asyncio.gather(*closing, return_exceptions=True):
            if failed is not None:
                raise failed


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, body: CompletionRequest, service: ServiceOf) -> Response:
    """What the model goes on with behind each prompt."""
    with blaming("prompt"):
        batch = await while_connected(request, Batch.ask(service, body))
    reply = Reply(batch, body)
    if body.stream:
        return EventStream(batch, reply.events(), send_timeout_s=service.config.send_timeout_s)
    try:
        results = await while_connected(request, batch.finish())
    finally:
        await batch.close()
    return Response(json_bytes(reply.whole(results)), media_type="application/json")


class Reply:
    """Answers as completions have them: whole, or in chunks."""

    def __init__(self, batch: Batch, body: CompletionRequest) -> None:
        first = batch.asked[0]
        model = first.model.model
        self._batch = batch
        self._n = body.n or 1
        self._echo = bool(body.echo)
        self._prompts = body.prompts()
        self._includes_usage = body.includes_usage
        self._logprobs = body.logprobs is not None
        self._tokenizer = model.tokenizer
        self._ends = () if body.ignore_eos else model.manifest.tokens.eos
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": first.created,
            "model": first.model_name,
            "system_fingerprint": system_fingerprint(model.manifest),
        }

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        completions = [each for result in results for each in result.completions]
        choices = [
            {
                "index": number,
                "text": self._beginning(number) + completion.text,
                "logprobs": self._logprobs_of(completion.pieces),
                "finish_reason": finish_reason(completion),
                **_timings(completions, number, alone=False),
            }
            for number, completion in enumerate(completions)
        ]
        costs = {"usage": usage(results), **_timings(completions, 0, alone=True)}
        return {**self._head, "choices": choices, **costs}

    async def events(self) -> AsyncIterator[bytes]:
        """A chunk a token, even without text: who measures counts them."""
        offsets = [0] * (len(self._prompts) * self._n)
        for number in range(len(offsets)) if self._echo else ():
            yield self._chunk(number, self._beginning(number))
        async for number, piece in self._batch:
            yield self._chunk(number, piece.text, self._logprobs_of((piece,), offsets[number]))
            offsets[number] += len(piece.text)
        results = [answers.result for answers in self._batch.asked]
        completions = [each for result in results for each in result.completions]
        alone = not self._includes_usage
        for number, completion in enumerate(completions):
            timings = _timings(completions, number, alone=False) or _timings(completions, 0, alone=alone)
            yield self._chunk(number, "", None, finish_reason(completion), **timings)
        if self._includes_usage:
            costs = {"usage": usage(results), **_timings(completions, 0, alone=True)}
            yield event({**self._head, "choices": [], **costs})
        yield b"data: [DONE]\n\n"

    def _chunk(
        self,
        number: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
        **more: Any,
    ) -> bytes:
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
        if self._includes_usage:
            more["usage"] = None
        return event({**self._head, "choices": [choice], **more})

    def _beginning(self, number: int) -> str:
        if not self._echo:
            return ""
        prompt = self._prompts[number // self._n]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, skip_special=False)

    def _logprobs_of(self, pieces: Sequence[Piece], offset: int = 0) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        tokens = [each for each in pieces if each.token_id not in self._ends]
        return completion_logprobs(self._tokenizer, tokens, offset)


def _timings(completions: Sequence[Completion], number: int, *, alone: bool) -> dict[str, Any]:
    """llama-server's, where it has them if there is one answer; of several each has its own."""
    return {"timings": reports.timings(completions[number])} if alone == (len(completions) == 1) else {}
