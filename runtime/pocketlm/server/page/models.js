// The model picker, and whether the server is there at all.

import { ApiError, fetchContextLength, fetchModels } from "./api.js";
import { askForKey } from "./dialogs.js";
import { byId, el } from "./dom.js";

const RETRY_MS = 2000;

export class Models {
  /** `hooks`: chosen(id), notice(text or null), changed(). */
  constructor(hooks) {
    this.hooks = hooks;
    this.all = [];
    this.fallback_length = null;
    this.select = byId("model");
    this.select.addEventListener("change", () => hooks.chosen(this.select.value));
    addEventListener("resize", () => this.#fit());
  }

  /** Asks the server until it answers: it may still be loading, or want a key first. */
  async load() {
    for (;;) {
      try {
        await this.refresh();
        this.hooks.notice(null);
        return;
      } catch (error) {
        if (error instanceof ApiError && error.status === 401) {
          if (await askForKey(error)) continue;
          this.hooks.notice("The server wants an API key. Reload the page to enter one.");
          return;
        }
        this.hooks.notice(error.loading ? "The server is loading its model." : `${error.message} Trying again.`);
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  /** Raises ApiError, ConnectionError. */
  async refresh() {
    this.all = await fetchModels();
    if (this.all.some(({ meta }) => !meta?.context_length)) this.fallback_length = await fetchContextLength().catch(() => null);
    this.hooks.changed();
  }

  /** The model that a conversation gets: the one it had, if it is still there. */
  pick(wanted) {
    const loaded = this.all.find(({ meta }) => meta?.loaded) ?? this.all[0];
    return (this.all.find(({ id }) => id === wanted) ?? loaded)?.id ?? null;
  }

  /** The tokens that a conversation with this model can hold; null where nobody says. */
  contextLength(id) {
    return this.#find(id)?.meta?.context_length ?? this.fallback_length;
  }

  isLoaded(id) {
    return this.#find(id)?.meta?.loaded !== false;
  }

  show(current) {
    this.select.disabled = this.all.length === 0;
    if (!this.all.length) return;
    this.select.replaceChildren(...this.all.map(({ id }) => el("option", { value: id })));
    this.select.value = current ?? "";
    this.#fit();
  }

  /** Leaves out the models' sizes, then their precisions, where there is no room for them. */
  #fit() {
    for (let parts = 3; parts > 0 && !this.select.disabled; parts -= 1) {
      for (const option of this.select.options) {
        const label = labelOf(option.value, this.#find(option.value)?.meta, parts);
        if (option.text !== label) option.text = label;
      }
      if (!this.#isCut()) return;
    }
  }

  #isCut() {
    const { width } = this.select.getBoundingClientRect();
    this.select.classList.add("unbounded");
    const { width: wanted } = this.select.getBoundingClientRect();
    this.select.classList.remove("unbounded");
    return wanted > width;
  }

  #find(id) {
    return this.all.find((model) => model.id === id);
  }
}

/** The name, and as far as they are known the precision (from 2 `parts` on) and the size (3). */
function labelOf(id, meta, parts) {
  const precision = parts > 1 && meta?.precision && !id.includes(meta.precision) ? [meta.precision] : [];
  const size = parts > 2 && Number.isFinite(meta?.bytes) ? [sizeOf(meta.bytes)] : [];
  return [id, ...precision, ...size].join(" · ");
}

const sizeOf = (bytes) => (bytes < 1e9 ? `${Math.round(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`);
