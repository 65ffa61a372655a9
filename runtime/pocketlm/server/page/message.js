// One message on the page: what it says, what can be done with it, and what it cost.

import { announce, copy, el, iconButton, textButton } from "./dom.js";
import { figuresView, liveLine, seconds, whole } from "./figures.js";
import { MarkdownStream, renderMarkdown } from "./markdown.js";

const TITLES = {
  overflow: "The conversation no longer fits the context",
  key: "The server wants an API key",
  busy: "The server is busy",
  connection: "The connection was lost",
  refused: "The server refused this",
  page: "Something went wrong",
};

/** A user's message. `actions`: edit(text). */
export class UserView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.bubble = el("div", { class: "bubble" }, message.content);
    const copyButton = iconButton("copy", "Copy the message", () => copy(message.content, copyButton));
    this.editButton = iconButton("edit", "Edit the message", () => this.edit());
    this.tools = el("div", { class: "tools" }, copyButton, this.editButton);
    this.element = el("article", { class: "message user" }, el("h2", { class: "heard" }, "You"), this.bubble, this.tools);
  }

  edit() {
    if (this.form) return;
    const id = `edit-${performance.now()}`;
    const field = el("textarea", { id, rows: Math.min(12, 1 + this.message.content.split("\n").length) });
    field.value = this.message.content;
    const cancel = () => this.#close();
    const send = () => {
      const text = field.value.trim();
      if (text) this.actions.edit(text);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const note = el("p", { class: "soft" }, "What came after this message is replaced.");
    const buttons = el("div", { class: "box-actions" }, textButton("Cancel", cancel), textButton("Send", send, "button primary"));
    this.form = el("div", { class: "edit" }, el("label", { class: "heard", for: id }, "Edit the message"), field, note, buttons);
    this.bubble.hidden = this.tools.hidden = true;
    this.element.append(this.form);
    field.focus();
  }

  #close() {
    this.form.remove();
    this.form = null;
    this.bubble.hidden = this.tools.hidden = false;
    this.editButton.focus();
  }
}

/** An assistant's message. `actions`: regenerate(), leaveOut(), newChat(). */
export class AnswerView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.body = el("div", { class: "markdown" });
    this.waiting = el("p", { class: "waiting", hidden: true }, el("span", { class: "dots", "aria-hidden": "true" }, el("i"), el("i"), el("i")));
    this.waitingText = this.waiting.appendChild(el("span"));
    this.problem = el("div");
    this.copyButton = iconButton("copy", "Copy the answer", () => copy(message.content, this.copyButton));
    this.again = iconButton("again", "Answer again", () => actions.regenerate());
    this.tools = el("div", { class: "tools" }, this.copyButton, this.again);
    this.cost = el("div", { class: "cost" });
    const foot = el("div", { class: "foot" }, this.cost, this.tools);
    this.element = el("article", { class: "message answer" }, el("h2", { class: "heard" }, "Answer"), this.body, this.waiting, this.problem, foot);
    this.stream = null;
    if (message.state !== "streaming") this.#finish();
  }

  /** Shows the answer as it comes, from what has come so far on. */
  follow(run) {
    this.run = run;
    this.stream = new MarkdownStream(this.body, announce);
    if (this.message.content) this.stream.push(this.message.content);
    this.update();
  }

  push(text) {
    this.stream.push(text);
  }

  /** The run's state has changed, or time has passed. */
  update() {
    const live = this.message.state === "streaming";
    this.element.classList.toggle("live", live);
    if (!live) return this.#finish();
    const { run } = this;
    this.waiting.hidden = !run.waiting;
    const clock = run.waiting && run.elapsed_s >= 2 && !run.waiting.includes(" s") ? ` · ${Math.floor(run.elapsed_s)} s` : "";
    setText(this.waitingText, run.waiting && `${run.waiting}${clock}`);
    this.cost.classList.add("running");
    setText(this.cost, liveLine(run));
    return undefined;
  }

  #finish() {
    if (this.stream) this.stream.end();
    else this.body.replaceChildren(...renderMarkdown(this.message.content));
    this.stream = this.run = null;
    this.waiting.hidden = true;

    this.copyButton.hidden = !this.message.content;
    this.again.hidden = Boolean(this.message.error); // the error has its own
    this.problem.replaceChildren(...this.#notes());
    this.cost.classList.remove("running");
    this.cost.replaceChildren(...(this.message.figures ? [figuresView(this.message.figures, this.message.model)] : []));
  }

  #notes() {
    const { state, finish, error, figures } = this.message;
    if (error) return [this.#problem(error)];
    if (state === "stopped") return [el("p", { class: "ending" }, this.message.content ? "Stopped" : "Stopped before the first word")];
    if (state === "streaming") return [];
    if (finish === "length") {
      const tokens = figures?.completion_tokens ? ` after ${whole(figures.completion_tokens)} tokens` : "";
      return [el("p", { class: "ending" }, `Ended by the limit${tokens}. A longer answer can be allowed in the settings, unless the context is full.`)];
    }
    return this.message.content ? [] : [el("p", { class: "ending" }, "The model answered with nothing")];
  }

  #problem(error) {
    const buttons = [textButton("Try again", () => this.actions.regenerate())];
    if (error.kind === "overflow") {
      buttons.unshift(textButton("Leave out the oldest messages", () => this.actions.leaveOut(), "button primary"));
      buttons.push(textButton("New chat", () => this.actions.newChat()));
    }
    const kept = this.message.content ? "What had come until then is kept above. " : "";
    const advice = error.kind === "overflow" ? " Or edit an earlier message to be shorter: what came after it then goes." : "";
    const text = error.kind === "key" ? "Try again to enter it." : error.message; // the server's tells developers of headers
    return el("div", { class: "problem", role: "alert" },
      el("p", { class: "problem-title" }, TITLES[error.kind] ?? TITLES.page),
      el("p", {}, `${kept}${text}${advice}`),
      el("div", { class: "problem-actions" }, ...buttons));
  }
}

/** Changes nothing where nothing changes. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** How long an answer has taken, for the status of a screen reader. */
export function summaryFor(run) {
  return run.message.state === "done" ? `Answer complete after ${seconds(run.elapsed_s)}.` : run.message.state === "stopped" ? "Stopped." : "";
}
