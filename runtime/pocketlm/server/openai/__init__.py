"""OpenAI's API.

chat.py          /v1/chat/completions
completions.py   /v1/completions: raw text or token ids
embeddings.py    /v1/embeddings
models.py        /v1/models
responses.py     /v1/responses
fields.py        what requests for text have in common, and the settings that they mean
messages.py  tools.py  response_format.py    parts of requests → what the engine takes
logprobs.py  usage.py                        parts of answers

Where this server differs from OpenAI's:

- Fields without a meaning here are refused, unless they ask for nothing.
- `user`, `safety_identifier`, `prompt_cache_key` and `metadata` are labels: as nothing is stored, they
  have no effect.
- A schema is always kept to, whether it is `strict` or not.
- Sampling that is left out is pocketlm's own: greedy, not at temperature 1.
- A role `developer` becomes `system`, which is what chat templates know.
"""
