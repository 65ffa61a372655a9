// The conversation on the page, and where it is scrolled to.

import { byId, copy, el } from "./dom.js";
import { AnswerView, UserView } from "./message.js";

const NEAR_PX = 60; // so near to the bottom, new text is followed

export class Thread {
  /** `actions`: edit(index, text), regenerate(index), leaveOut(index), newChat(). */
  constructor(actions) {
    this.actions = actions;
    this.element = byId("thread");
    this.scroller = byId("scroller");
    this.toBottom = byId("to-bottom");
    this.views = [];
    this.sticks = true;
    this.lastTop_px = 0;
    this.scroller.addEventListener("scroll", () => this.#onScroll(), { passive: true });
    const grown = new ResizeObserver(() => this.#follow());
    grown.observe(this.scroller);
    grown.observe(this.element);
    this.toBottom.addEventListener("click", () => this.scrollToEnd());
    this.element.addEventListener("click", ({ target }) => {
      const button = target.closest("[data-action=copy-code]");
      if (button) copy(button.closest(".code").querySelector("code").textContent, button);
    });
  }

  /** Shows a whole conversation, its newest messages first in view. */
  show(conversation) {
    this.conversation = conversation;
    this.views = [];
    this.element.replaceChildren();
    this.sync();
    this.scrollToEnd();
  }

  /** Makes the page follow the conversation: views of messages that are there already stay. */
  sync() {
    const { messages, from } = this.conversation;
    const same = messages.findIndex((message, index) => this.views[index]?.message !== message);
    const kept = same === -1 ? messages.length : same;
    for (const view of this.views.splice(kept)) view.element.remove();
    for (const message of messages.slice(kept)) {
      const view = this.#view(message, this.views.length);
      this.views.push(view);
      this.element.append(view.element);
    }
    this.#showDivider(from);
    this.#markLast();
  }

  /** The view of this message, if it is on the page. */
  viewOf(message) {
    return this.views.find((view) => view.message === message);
  }

  /** Opens the newest message of the user for editing. */
  editLast() {
    this.views.findLast((view) => view instanceof UserView)?.edit();
  }

  scrollToEnd() {
    this.sticks = true;
    this.#follow();
  }

  #view(message, index) {
    if (message.role === "user") return new UserView(message, { edit: (text) => this.actions.edit(index, text) });
    return new AnswerView(message, {
      regenerate: () => this.actions.regenerate(index),
      leaveOut: () => this.actions.leaveOut(index),
      newChat: this.actions.newChat,
    });
  }

  #markLast() {
    this.views.forEach((view, index) => view.element.classList.toggle("last", index === this.views.length - 1));
  }

  #showDivider(from) {
    this.divider?.remove();
    this.divider = null;
    this.views.forEach((view, index) => view.element.classList.toggle("left-out", index < from));
    if (from <= 0 || from >= this.views.length) return;
    this.divider = el("p", { class: "divider" }, "The messages above are no longer sent to the model");
    this.views[from].element.before(this.divider);
  }

  #onScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    // Only going up ends it: text that came since the page was last scrolled does not.
    if (scrollHeight - scrollTop - clientHeight < NEAR_PX) this.sticks = true;
    else if (scrollTop < this.lastTop_px) this.sticks = false;
    this.lastTop_px = scrollTop;
    this.toBottom.hidden = this.sticks;
  }

  #follow() {
    if (this.sticks) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.toBottom.hidden = this.sticks;
  }
}
