// One answer on its way: asks, waits where the server says so, and fills the message.

import { ApiError, ConnectionError, isReady, streamChat } from "./api.js";
import { figuresOf } from "./figures.js";

const MAX_RETRIES = 8; // of a full queue, before the user is asked
const READY_POLL_MS = 700;

export class Run {
  /**
   * `message` is the assistant's message to fill. `hooks`: `text(piece)`, `change()` when the state or the
   * waiting has changed, `askForKey()` → whether there is a new key.
   */
  constructor(message, hooks) {
    this.message = message;
    this.hooks = hooks;
    this.controller = new AbortController();
    this.waiting = "";
    this.begin_ms = performance.now();
    this.first_ms = null;
    this.last_ms = null;
    this.pieces = 0;
  }

  stop() {
    this.controller.abort();
  }

  /** Seconds from the request to the first token; null before it. */
  get ttft_s() {
    return this.first_ms === null ? null : (this.first_ms - this.begin_ms) / 1000;
  }

  /** Pieces a second behind the first; nearly always a piece is a token. Null before the third. */
  get tokens_per_s() {
    return this.pieces < 3 || this.last_ms <= this.first_ms ? null : (1000 * (this.pieces - 1)) / (this.last_ms - this.first_ms);
  }

  get elapsed_s() {
    return (performance.now() - this.begin_ms) / 1000;
  }

  /** Runs to the end, whatever the end is: `message.state` says it. Never fails. */
  async go(body, waiting) {
    try {
      await this.#ask(body, waiting);
      this.message.state = "done";
    } catch (error) {
      this.message.state = this.controller.signal.aborted ? "stopped" : "failed";
      if (this.message.state === "failed") this.message.error = described(error);
    }
    this.waiting = "";
    this.message.figures ??= this.first_ms === null ? null : figuresOf({}, this);
    this.hooks.change();
  }

  async #ask(body, waiting) {
    for (let retries = 0; ; retries += 1) {
      this.begin_ms = performance.now();
      this.#wait(waiting);
      try {
        return await this.#stream(body);
      } catch (error) {
        if (!(error instanceof ApiError) || this.message.content) throw error;
        if (error.status === 401 && (await this.hooks.askForKey(error))) continue;
        else if (error.loading) await this.#untilReady();
        else if (error.busy && error.retryAfter_s !== null && retries < MAX_RETRIES) await this.#pause(error);
        else throw error;
      }
    }
  }

  async #stream(body) {
    for await (const chunk of streamChat(body, this.controller.signal)) {
      const [choice] = chunk.choices ?? [];
      const text = choice?.delta?.content;
      if (text) this.#piece(text);
      if (choice?.finish_reason) this.message.finish = choice.finish_reason;
      if (chunk.model) this.message.model = chunk.model;
      if (chunk.usage || chunk.timings) this.message.figures = figuresOf(chunk, this);
    }
  }

  #piece(text) {
    this.last_ms = performance.now();
    this.first_ms ??= this.last_ms;
    this.pieces += 1;
    this.message.content += text;
    this.hooks.text(text);
    if (this.waiting) this.#wait("");
  }

  #wait(text) {
    this.waiting = text;
    this.hooks.change();
  }

  async #untilReady() {
    this.#wait("Loading the model");
    do await this.#sleep(READY_POLL_MS);
    while (!(await isReady(this.controller.signal)));
  }

  async #pause(error) {
    const until_ms = performance.now() + 1000 * Math.min(60, Math.max(0.2, error.retryAfter_s));
    for (let left_ms; (left_ms = until_ms - performance.now()) > 0; ) {
      this.#wait(`The server is busy. Trying again in ${Math.ceil(left_ms / 1000)} s`);
      await this.#sleep(Math.min(1000, left_ms));
    }
  }

  #sleep(duration_ms) {
    const { signal } = this.controller;
    return new Promise((resolve, reject) => {
      const abort = () => {
        clearTimeout(timer);
        reject(signal.reason);
      };
      const timer = setTimeout(() => {
        signal.removeEventListener("abort", abort);
        resolve();
      }, duration_ms);
      if (signal.aborted) abort();
      signal.addEventListener("abort", abort, { once: true });
    });
  }
}

/** An error as data that can be kept. */
function described(error) {
  if (error instanceof ApiError) {
    const kind = error.overflow ? "overflow" : error.status === 401 ? "key" : error.busy ? "busy" : "refused";
    return { kind, status: error.status, message: error.message };
  }
  if (error instanceof ConnectionError) return { kind: "connection", message: error.message };
  return { kind: "page", message: `Something went wrong in the page: ${error.message}` };
}
