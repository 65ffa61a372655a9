// The server's API. Addresses are relative, so that the page also works below a path of a proxy.

const KEY = "pocketlm.api-key";
let key = null;

/** What the server refused, or what broke while it answered. */
export class ApiError extends Error {
  constructor(status, { message, type = null, code = null } = {}, retryAfter_s = null) {
    super(message || `The server answered with status ${status}.`);
    this.status = status;
    this.type = type;
    this.code = code;
    this.retryAfter_s = retryAfter_s;
  }

  get loading() {
    return this.status === 503 && (this.code === "loading" || /^loading model/i.test(this.message));
  }

  get busy() {
    return (this.status === 503 && !this.loading) || this.status === 429;
  }

  get overflow() {
    return this.code === "context_length_exceeded";
  }
}

/** The server could not be reached, or the connection ended before the answer did. */
export class ConnectionError extends Error {}

/** Remembers the key in this tab, and on this device if `lasting`. */
export function useKey(value, lasting) {
  key = value;
  try {
    sessionStorage.setItem(KEY, value);
    if (lasting) localStorage.setItem(KEY, value);
    else localStorage.removeItem(KEY);
  } catch {
    // Storage is forbidden: the key lasts as long as the page.
  }
}

function knownKey() {
  try {
    key ??= sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY);
  } catch {
    // As above.
  }
  return key;
}

async function request(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (knownKey()) headers.Authorization = `Bearer ${knownKey()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "omit", redirect: "error", cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ConnectionError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let error;
  try {
    error = (await response.json()).error;
  } catch {
    // Something in between answered: the status is all there is.
  }
  const retryAfter_s = Number.parseFloat(response.headers.get("Retry-After"));
  return new ApiError(response.status, error, Number.isFinite(retryAfter_s) ? retryAfter_s : null);
}

/** The models that the server offers: {id, meta}. Raises ApiError, ConnectionError. */
export async function fetchModels(signal) {
  const { data } = await (await request("v1/models", { signal })).json();
  return data;
}

/** The tokens that one conversation can hold, from /props. */
export async function fetchContextLength(signal) {
  const props = await (await request("props", { signal })).json();
  return props.default_generation_settings?.n_ctx ?? null;
}

/** Whether the server takes requests; false while it loads. Raises ConnectionError. */
export async function isReady(signal) {
  try {
    await request("health", { signal });
    return true;
  } catch (error) {
    if (error instanceof ApiError) return error.status !== 503;
    throw error;
  }
}

/** The chunks of one answer as they come. Raises ApiError, ConnectionError, and AbortError when stopped. */
export async function* streamChat(body, signal) {
  const streaming = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { method: "POST", body: streaming, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let complete = false;
  try {
    for await (const data of events(reader, signal)) {
      complete = data === "[DONE]";
      if (complete) return;
      const chunk = parsed(data);
      complete = Boolean(chunk.error);
      if (complete) throw new ApiError(response.status, chunk.error);
      yield chunk;
    }
  } finally {
    if (complete) void drain(reader);
    else reader.cancel().catch(() => {}); // it may be broken already
  }
  throw new ConnectionError("The connection was lost before the answer was complete.");
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ConnectionError("The answer arrived damaged.");
  }
}

/** Reads to the end of the body: to the server, one who leaves at the last event has broken the answer off. */
async function drain(reader) {
  try {
    while (!(await reader.read()).done);
  } catch {
    // The answer is here; what became of the connection does not matter.
  }
}

/** The data of server-sent events (HTML standard, section 9.2). */
async function* events(reader, signal) {
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (signal?.aborted || error instanceof ApiError) throw error;
    throw new ConnectionError("The connection was lost before the answer was complete.");
  }
}
