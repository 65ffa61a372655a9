// What the page does: conversations, and answers under way in them. The views show it.

import { Composer } from "./composer.js";
import {
  asJson, asMarkdown, fileName, fromJson, leaveOutOldest, newConversation, requestFor, titleFrom, titleOf, truncate,
  withNewId,
} from "./conversation.js";
import { askForKey, confirm } from "./dialogs.js";
import { announce, byId, clearAnnouncements, download } from "./dom.js";
import { summaryFor } from "./message.js";
import { Models } from "./models.js";
import { Notices } from "./notices.js";
import { Run } from "./run.js";
import { SettingsPanel } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Thread } from "./thread.js";

const SAVE_EVERY_MS = 1500;
const TICK_MS = 250;
const SAME = "It is the same answer: the likeliest token is taken each time. A temperature above 0 in the settings varies it.";

export class App {
  constructor(store) {
    this.store = store;
    this.conversations = new Map();
    this.runs = new Map(); // conversation → its answer under way
    this.drafts = new Map(); // conversation's id → what stands in the message field
    this.defaults = {};
    this.notices = new Notices();
    this.thread = new Thread({
      edit: (index, text) => this.edit(index, text), regenerate: (index) => this.regenerate(index),
      leaveOut: (index) => this.leaveOut(index), newChat: () => this.newChat(),
    });
    this.composer = new Composer({ send: (text) => this.send(text), stop: () => this.stop(), editLast: () => this.thread.editLast() });
    this.sidebar = new Sidebar({
      newChat: () => this.newChat(), rename: (id, title) => this.rename(id, title), remove: (id) => this.remove(id),
      exportOne: (id, format) => this.exportOne(id, format), exportAll: () => this.exportAll(),
      removeAll: () => this.removeAll(), importFile: (file) => this.importFile(file),
    });
    this.settings = new SettingsPanel({
      current: () => this.current, changed: () => this.#saveIfKept(this.current),
      saveDefaults: () => this.#saveDefaults(), reset: () => this.#resetSettings(),
    });
    this.models = new Models({
      chosen: (id) => this.chooseModel(id), changed: () => this.#showModel(),
      notice: (text) => this.notices.show("server", text),
    });
  }

  async start() {
    this.store.onTrouble = (text) => this.notices.show("storage", text);
    this.store.onChange = () => this.#onOtherTab();
    if (this.store.trouble) this.store.onTrouble(this.store.trouble);
    this.defaults = (await this.store.preference("defaults")) ?? {};
    this.lastModel = await this.store.preference("model");
    await this.store.takeLeft();
    for (const each of await this.store.conversations()) this.conversations.set(each.id, mended(each));
    this.#openFromAddress();
    addEventListener("hashchange", () => this.#openFromAddress());
    await this.models.load();
  }

  // Which conversation is open.

  newChat() {
    if (location.hash) history.pushState(null, "", location.pathname + location.search);
    this.#open(newConversation(this.defaults));
  }

  #openFromAddress() {
    const kept = this.conversations.get(location.hash.slice(1));
    if (kept && kept === this.current) return;
    this.#open(kept ?? newConversation(this.defaults));
  }

  #open(conversation) {
    if (this.current) this.drafts.set(this.current.id, this.composer.text);
    this.current = conversation;
    this.composer.text = this.drafts.get(conversation.id) ?? "";
    this.thread.show(conversation);
    const run = this.runs.get(conversation);
    if (run) this.thread.viewOf(run.message).follow(run);
    this.#showModel();
    this.#show();
    this.composer.focus();
  }

  // Messages.

  send(text) {
    const conversation = this.current;
    conversation.messages.push({ role: "user", content: text });
    conversation.title ||= titleFrom(text);
    this.conversations.set(conversation.id, conversation);
    if (location.hash.slice(1) !== conversation.id) history.replaceState(null, "", `#${conversation.id}`);
    this.#answer(conversation);
  }

  /** Another text for the user's message at `index`; what came after it goes. */
  edit(index, text) {
    this.stop();
    const conversation = this.current;
    const titled = conversation.title === titleFrom(conversation.messages[index].content);
    truncate(conversation, index);
    conversation.messages.push({ role: "user", content: text });
    if (index === 0 && titled) conversation.title = titleFrom(text);
    this.#answer(conversation);
    this.composer.focus();
  }

  regenerate(index) {
    if (this.runs.has(this.current)) return;
    const { content, state } = this.current.messages[index];
    truncate(this.current, index);
    this.#answer(this.current, state === "done" ? content : null);
    this.composer.focus();
  }

  /** Answers again with fewer messages: so many that about three quarters of the context are used. */
  leaveOut(index) {
    const numbers = this.current.messages[index].error.message.match(/\d[\d,]*/g)?.map((text) => Number(text.replaceAll(",", "")));
    const [asked, limit] = numbers ?? [];
    if (leaveOutOldest(this.current, limit < asked ? (0.75 * limit) / asked : 0.5)) this.regenerate(index);
    else this.notices.show("context", "There is only one message to send, and it is too long. Edit it to be shorter.");
  }

  /** Ends the open conversation's answer. Returns whether there was one. */
  stop() {
    const run = this.runs.get(this.current);
    run?.stop();
    return Boolean(run);
  }

  #answer(conversation, before = null) {
    this.notices.show("context", null);
    this.notices.show("same", null);
    clearAnnouncements();
    const message = { role: "assistant", content: "", state: "streaming", model: null, finish: null, figures: null };
    const model = this.models.pick(conversation.model ?? this.lastModel);
    const body = requestFor(conversation, model);
    conversation.messages.push(message);
    conversation.model ??= model;
    conversation.updated = Date.now();
    const view = () => (this.current === conversation ? this.thread.viewOf(message) : undefined);
    const run = new Run(message, {
      text: (text) => view()?.push(text),
      change: () => view()?.update(),
      askForKey,
    });
    this.runs.set(conversation, run);
    this.thread.sync();
    view().follow(run);
    this.thread.scrollToEnd();
    this.#show();
    void this.#finish(conversation, run, body, view).then(() => {
      if (view() && message.state === "done" && message.content === before) this.notices.show("same", SAME);
    });
  }

  async #finish(conversation, run, body, view) {
    const ticker = setInterval(() => view()?.update(), TICK_MS);
    const saver = setInterval(() => this.#saveIfKept(conversation), SAVE_EVERY_MS);
    this.#saveIfKept(conversation);
    const loaded = this.models.isLoaded(body.model);
    await run.go(body, loaded ? "Reading the prompt" : `Loading ${body.model}`);
    clearInterval(ticker);
    clearInterval(saver);
    if (this.runs.get(conversation) === run) this.runs.delete(conversation);
    conversation.updated = Date.now();
    if (view()) announce(summaryFor(run));
    this.#saveIfKept(conversation);
    this.#show();
    if (!loaded) this.models.refresh().catch(() => {}); // the next answer says what is wrong
  }

  // Models and settings.

  chooseModel(id) {
    this.lastModel = this.current.model = id;
    void this.store.setPreference("model", id);
    this.#saveIfKept(this.current);
    this.#showContext();
  }

  #saveDefaults() {
    this.defaults = { system: this.current.system, settings: { ...this.current.settings } };
    void this.store.setPreference("defaults", this.defaults);
  }

  #resetSettings() {
    const { system, settings } = newConversation(this.defaults);
    Object.assign(this.current, { system, settings });
    this.#saveIfKept(this.current);
  }

  // The list.

  rename(id, title) {
    this.conversations.get(id).title = title;
    this.#saveIfKept(this.conversations.get(id));
    this.#show();
  }

  async remove(id) {
    const conversation = this.conversations.get(id);
    if (!(await confirm("Delete this conversation?", `“${titleOf(conversation)}” is deleted from this browser for good.`, "Delete"))) return;
    this.runs.get(conversation)?.stop();
    this.conversations.delete(id);
    this.drafts.delete(id);
    await this.store.remove(id);
    if (this.current === conversation) this.newChat();
    else this.#show();
  }

  async removeAll() {
    const count = this.conversations.size;
    const what = count === 1 ? "The only conversation is" : `All ${count} conversations are`;
    if (!(await confirm("Delete all conversations?", `${what} deleted from this browser for good.`, "Delete all"))) return;
    for (const run of this.runs.values()) run.stop();
    this.conversations.clear();
    this.drafts.clear();
    await this.store.removeAll();
    this.newChat();
  }

  exportOne(id, format) {
    const conversation = this.conversations.get(id);
    if (format === "md") download(fileName(titleOf(conversation), "md"), "text/markdown", asMarkdown(conversation));
    else download(fileName(titleOf(conversation), "json"), "application/json", asJson([conversation]));
  }

  exportAll() {
    download("pocketlm-conversations.json", "application/json", asJson(this.#sorted()));
  }

  async importFile(file) {
    let imported;
    try {
      imported = fromJson(await file.text());
    } catch (error) {
      this.notices.show("import", error.message);
      return;
    }
    for (const each of imported) {
      const conversation = this.conversations.has(each.id) ? withNewId(each) : each;
      this.conversations.set(conversation.id, conversation);
      await this.store.save(conversation);
    }
    this.notices.show("import", `${imported.length} ${imported.length === 1 ? "conversation" : "conversations"} imported.`);
    this.#show();
  }

  // Keeping and showing.

  /** A conversation is kept from its first message on, and not any more once it is deleted. */
  #saveIfKept(conversation) {
    if (this.conversations.get(conversation.id) === conversation) void this.store.save(conversation);
  }

  /** Before the page is closed. */
  leave() {
    const kept = [...this.runs.keys()].filter((each) => this.conversations.get(each.id) === each);
    if (kept.length) this.store.leave(kept);
  }

  async #onOtherTab() {
    const kept = new Map((await this.store.conversations()).map((each) => [each.id, each]));
    for (const [id, mine] of this.conversations) {
      if (mine !== this.current && !this.runs.has(mine) && !kept.has(id)) this.conversations.delete(id);
    }
    for (const [id, theirs] of kept) {
      const mine = this.conversations.get(id);
      if (this.runs.has(mine)) continue;
      const open = mine === this.current;
      if (open && (theirs.updated <= mine.updated || isAnswering(theirs))) continue;
      this.conversations.set(id, theirs);
      if (open) this.#open(theirs);
    }
    this.#show();
  }

  #sorted() {
    return [...this.conversations.values()].sort((one, other) => other.updated - one.updated);
  }

  #show() {
    const { current } = this;
    const busyIds = new Set([...this.runs.keys()].map(({ id }) => id));
    this.sidebar.show(this.#sorted(), current.id, busyIds);
    byId("empty").hidden = current.messages.length > 0;
    byId("title").textContent = titleOf(current);
    document.title = current.title ? `${current.title} – pocketlm` : "pocketlm";
    this.composer.setBusy(this.runs.has(current));
    this.#showContext();
  }

  #showModel() {
    this.models.show(this.models.pick(this.current.model ?? this.lastModel));
    this.#showContext();
  }

  #showContext() {
    const used = this.current.messages.findLast(({ figures }) => figures?.total_tokens)?.figures.total_tokens ?? null;
    this.composer.showContext(used, this.models.contextLength(this.models.pick(this.current.model ?? this.lastModel)));
  }
}

const isAnswering = ({ messages }) => messages.some(({ state }) => state === "streaming");

/** An answer that was under way when the page was closed has ended as it is. */
function mended(conversation) {
  for (const message of conversation.messages) {
    if (message.state !== "streaming") continue;
    message.state = "failed";
    message.error = { kind: "connection", message: "The page was closed before the answer was complete." };
  }
  return conversation;
}
