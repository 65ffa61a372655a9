// Where messages are written.

import { byId } from "./dom.js";
import { whole } from "./figures.js";

const MAX_HEIGHT_PX = 240;

export class Composer {
  /** `actions`: send(text), stop(), editLast(). */
  constructor(actions) {
    this.field = byId("prompt");
    this.send = byId("send");
    this.stop = byId("stop");
    this.touch = matchMedia("(hover: none) and (pointer: coarse)");
    byId("hint").hidden = this.touch.matches;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit(actions);
    });
    this.stop.addEventListener("click", () => actions.stop());
    this.field.addEventListener("input", () => this.#fit());
    this.field.addEventListener("keydown", (event) => this.#onKey(event, actions));
    this.#fit();
  }

  get text() {
    return this.field.value;
  }

  set text(text) {
    this.field.value = text;
    this.#fit();
  }

  focus() {
    if (!this.touch.matches) this.field.focus(); // no keyboard jumps up on a phone
  }

  /** Whether an answer is under way here: then it can be stopped, and nothing sent. */
  setBusy(busy) {
    const hadFocus = document.activeElement === this.stop;
    this.stop.hidden = !busy;
    this.send.hidden = busy;
    if (!busy && hadFocus) this.field.focus();
  }

  /** How much of the context is in use; null where it is not known. */
  showContext(used, length) {
    byId("context").hidden = used === null || length === null;
    if (used === null || length === null) return;
    const share = Math.min(1, used / length);
    byId("context-text").textContent = `${whole(used)} of ${whole(length)} tokens of context`;
    byId("context-fill").style.width = `${100 * share}%`;
    byId("context").classList.toggle("nearly-full", share > 0.85);
  }

  #submit(actions) {
    const text = this.text.trim();
    if (!text || this.send.hidden) return;
    this.text = "";
    actions.send(text);
  }

  #onKey(event, actions) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey && !this.touch.matches) {
      event.preventDefault();
      this.#submit(actions);
    } else if (event.key === "ArrowUp" && !this.text && this.stop.hidden) {
      event.preventDefault();
      actions.editLast();
    }
  }

  #fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(MAX_HEIGHT_PX, this.field.scrollHeight)}px`;
    this.send.disabled = !this.text.trim();
  }
}
