// The panel with the system prompt and the sampling settings.

import { SETTINGS } from "./conversation.js";
import { byId, el } from "./dom.js";

export class SettingsPanel {
  /** `hooks`: current() → the conversation, changed(), saveDefaults(), reset(). */
  constructor(hooks) {
    this.hooks = hooks;
    this.dialog = byId("settings");
    this.system = byId("system");
    this.status = byId("settings-status");
    this.fields = new Map(SETTINGS.map((setting) => [setting.name, this.#field(setting)]));
    byId("open-settings").addEventListener("click", () => this.open());
    byId("close-settings").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", ({ target }) => {
      if (target === this.dialog) this.dialog.close(); // the backdrop
    });
    this.system.addEventListener("input", () => {
      hooks.current().system = this.system.value;
      hooks.changed();
    });
    byId("save-defaults").addEventListener("click", () => {
      hooks.saveDefaults();
      this.status.textContent = "New chats begin with these settings.";
    });
    byId("reset-settings").addEventListener("click", () => {
      hooks.reset();
      this.#show();
      this.status.textContent = "These are the defaults again.";
    });
  }

  open() {
    this.#show();
    this.status.textContent = "";
    this.dialog.showModal();
  }

  #show() {
    const { system, settings } = this.hooks.current();
    this.system.value = system;
    for (const [name, input] of this.fields) {
      input.value = settings[name] ?? "";
      this.#mark(input);
    }
  }

  #field({ name, label, min, max, step, hint }) {
    const id = `setting-${name}`;
    const input = el("input", { id, type: "number", inputmode: Number.isInteger(step) ? "numeric" : "decimal", min, max, step: Number.isInteger(step) ? step : "any", placeholder: "default", "aria-describedby": `${id}-hint ${id}-error` });
    input.addEventListener("input", () => {
      const { settings } = this.hooks.current();
      this.#mark(input);
      if (!input.validity.valid) return;
      if (input.value === "") delete settings[name];
      else settings[name] = Number(input.value);
      this.hooks.changed();
    });
    const error = el("span", { class: "field-error", id: `${id}-error` });
    byId("sampling").append(el("div", { class: "field row" }, el("label", { for: id }, label), input, el("span", { class: "hint", id: `${id}-hint` }, hint), error));
    return input;
  }

  #mark(input) {
    const wrong = !input.validity.valid;
    input.setAttribute("aria-invalid", String(wrong));
    const range = input.max ? `from ${input.min} to ${input.max}` : `from ${input.min} on`;
    byId(`${input.id}-error`).textContent = wrong ? `A ${input.step === "any" ? "" : "whole "}number ${range}. This one is not used.` : "";
  }
}
