// Lines above the conversation that say what is wrong, or what was done.

import { byId, el, iconButton } from "./dom.js";

export class Notices {
  constructor() {
    this.shown = new Map(); // one line a topic
  }

  /** Shows this line, in place of the one of the same topic; null takes it away. */
  show(topic, text) {
    const old = this.shown.get(topic);
    if (old?.dataset.text === text) return;
    old?.remove();
    this.shown.delete(topic);
    if (!text) return;
    const close = iconButton("close", "Close this notice", () => this.show(topic, null));
    const line = el("div", { class: "notice", "data-text": text }, el("span", {}, text), close);
    this.shown.set(topic, line);
    byId("notices").append(line);
  }
}
