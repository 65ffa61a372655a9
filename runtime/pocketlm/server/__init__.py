"""`pocketlm serve`: the engine behind HTTP, for the clients that people have already.

config.py        what the operator has chosen
serve.py         listens, and drains when it is told to end
app.py           puts the rest together
security.py      who is let in, and how much of it: before anything else looks at a request
model_store.py   the models: loaded on demand under a memory budget, unloaded when idle
answers.py       a request → pieces of answers, and what they cost
event_stream.py  pieces → server-sent events or lines of JSON
openai/  anthropic.py  ollama.py  native.py    one room an API: fields in, answers out
page/            the chat page
metrics.py       counts for Prometheus

Everything here needs the extra `serve`.
"""
