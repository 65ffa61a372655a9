"""`pocketlm serve`: the engine behind HTTP, for the clients that people have already.

config.py  launch.py             what the operator has chosen, and the application made of it
serve.py  http_protocol.py       listens, and drains when it is told to end
addresses.py  access_log.py      where others find it; a line for each request, without what was said
app.py                           puts the rest together
security.py  limits.py           who is let in, and how much of it: before anything else looks at a request
open_paths.py  watched_send.py   what needs no key; whether an answer has begun
model_store.py  model_use.py     the models: loaded on demand, unloaded when idle
served_models.py  memory.py      by which names, and what they take
answers.py  reports.py           a request → pieces of answers, and what they cost
event_stream.py                  pieces → server-sent events or lines of JSON
fields.py  messages.py  errors.py    what requests are made of, and what is said of those that are wrong
openai/  anthropic/  ollama/  native.py    one room an API: fields in, answers out
page.py  page/                   the chat page
metrics.py                       counts for Prometheus

Everything here needs the extra `serve`.
"""
