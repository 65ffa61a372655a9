"""Ollama's API.

generation.py    /api/chat, /api/generate
embeddings.py    /api/embed, /api/embeddings
models.py        /api/tags, /api/show, /api/ps, /api/version; those that change models are refused
fields.py        what requests have in common, and the settings that their options mean
messages.py      a conversation → messages as the chat template takes them
descriptions.py  a model as the API describes it
times.py         times and durations

Where this server differs from Ollama:

- Nothing is cut silently. A conversation that outgrows the context is refused, unless `truncate` asks for its
  oldest messages to be left out; `dropped_messages` tells how many. A text to embed is never cut.
- The operator sizes the context: `num_ctx` may ask for as much as there is, not for more. `num_predict` −1
  and −2 go on until it is full; nothing is shifted out of it.
- Sampling that is left out is pocketlm's own: greedy. Penalties look at all tokens (`repeat_last_n` −1), the
  presence and frequency penalties at those of the answer.
- Options that would change the answer in ways that are missing here, or what the operator has chosen, are
  refused; the values that ask for what is done anyway are taken.
- Thoughts sent back are no part of a prompt.
- Vectors have length one at `/api/embeddings` too.
- Answers have no `context`: send the messages again, what is known of them is cached.
- `energy`, `cached_tokens` and `dropped_messages` are pocketlm's own.
"""

from __future__ import annotations

from fastapi import APIRouter

from pocketlm.server.ollama import embeddings, generation, models

router = APIRouter()
for _room in (generation, embeddings, models):
    router.include_router(_room.router)
