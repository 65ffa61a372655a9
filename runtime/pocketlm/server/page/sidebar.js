// The list of conversations; on narrow screens a drawer.

import { titleOf } from "./conversation.js";
import { byId, el, icon } from "./dom.js";

const MAX_TITLE_CHARS = 200;

export class Sidebar {
  /** `actions`: newChat(), rename(id, title), remove(id), exportOne(id, format), exportAll(), removeAll(), importFile(file). */
  constructor(actions) {
    this.actions = actions;
    this.element = byId("sidebar");
    this.list = byId("conversations");
    this.menu = byId("conversation-menu");
    this.narrow = matchMedia("(max-width: 820px)");
    this.#drawer();
    byId("new-chat").addEventListener("click", () => this.#leave(actions.newChat));
    byId("export-all").addEventListener("click", actions.exportAll);
    byId("delete-all").addEventListener("click", actions.removeAll);
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", ({ target }) => {
      if (target.files[0]) actions.importFile(target.files[0]);
      target.value = "";
    });
    this.list.addEventListener("click", ({ target }) => {
      const more = target.closest(".more");
      if (more) this.#openMenu(more);
      else if (target.closest("a")) this.close(false);
    });
    this.menu.addEventListener("click", ({ target }) => this.#choose(target.dataset.action));
  }

  /** Shows the conversations, the newest first. */
  show(conversations, currentId, busyIds) {
    const focusedId = document.activeElement?.closest?.("li[data-id]")?.dataset.id;
    const focusedClass = document.activeElement?.className;
    this.list.replaceChildren(...conversations.map((each) => this.#item(each, each.id === currentId, busyIds.has(each.id))));
    if (focusedId) this.#itemOf(focusedId)?.querySelector(`.${focusedClass}`)?.focus();
    byId("export-all").disabled = byId("delete-all").disabled = conversations.length === 0;
  }

  open() {
    this.element.classList.add("open");
    byId("scrim").hidden = false;
    byId("open-sidebar").setAttribute("aria-expanded", "true");
    this.#lock();
    byId("new-chat").focus();
  }

  close(returnFocus = true) {
    if (!this.element.classList.contains("open")) return;
    this.element.classList.remove("open");
    byId("scrim").hidden = true;
    byId("open-sidebar").setAttribute("aria-expanded", "false");
    this.#lock();
    if (returnFocus) byId("open-sidebar").focus();
  }

  #drawer() {
    byId("open-sidebar").addEventListener("click", () => this.open());
    byId("close-sidebar").addEventListener("click", () => this.close());
    byId("scrim").addEventListener("click", () => this.close());
    this.element.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.element.classList.contains("open")) return;
      this.close();
      event.stopPropagation();
    });
    this.narrow.addEventListener("change", () => this.#lock());
    this.#lock();
  }

  /** What cannot be seen cannot be reached either. */
  #lock() {
    const open = this.element.classList.contains("open");
    this.element.inert = this.narrow.matches && !open;
    byId("main").inert = this.narrow.matches && open;
  }

  #leave(action) {
    this.close(false);
    action();
  }

  #item(conversation, current, busy) {
    const title = titleOf(conversation);
    const link = el("a", { class: "open-link", href: `#${conversation.id}`, "aria-current": current && "page", title }, title);
    const more = el("button", { class: "more", type: "button", "aria-label": `More for ${title}`, "aria-haspopup": "true" }, icon("more"));
    const dot = busy ? el("span", { class: "busy", role: "img", "aria-label": "answering" }) : null;
    return el("li", { "data-id": conversation.id, class: current && "current" }, link, dot, more);
  }

  #itemOf(id) {
    return [...this.list.children].find((item) => item.dataset.id === id);
  }

  #openMenu(button) {
    this.chosenId = button.closest("li").dataset.id;
    this.opener = button;
    this.menu.showPopover();
    const at = button.getBoundingClientRect();
    const { offsetWidth, offsetHeight } = this.menu;
    this.menu.style.left = `${Math.max(8, Math.min(at.left, innerWidth - offsetWidth - 8))}px`;
    this.menu.style.top = `${Math.max(8, Math.min(at.bottom + 4, innerHeight - offsetHeight - 8))}px`;
    this.menu.querySelector("button").focus();
  }

  #choose(action) {
    if (!action) return;
    this.menu.hidePopover();
    if (action === "rename") this.#rename(this.chosenId);
    else if (action === "delete") this.actions.remove(this.chosenId);
    else this.actions.exportOne(this.chosenId, action === "export-json" ? "json" : "md");
  }

  #rename(id) {
    const item = this.#itemOf(id);
    const link = item.querySelector("a");
    const input = el("input", { class: "rename", "aria-label": "Title", maxlength: MAX_TITLE_CHARS });
    input.value = link.textContent;
    let open = true;
    const end = (keep) => {
      if (!open) return;
      open = false;
      const title = input.value.trim();
      input.replaceWith(link);
      item.querySelector(".more").focus();
      if (keep && title) this.actions.rename(id, title);
    };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.stopPropagation();
      end(event.key === "Enter");
    });
    input.addEventListener("blur", () => end(true));
    link.replaceWith(input);
    input.select();
  }
}
