// The chat page. It talks to the server that it came from, and to nobody else.
//
// app.js            what the page does         run.js       one answer on its way
// conversation.js   a conversation as data     store.js     what the browser keeps
// api.js            the server's API           markdown.js  Markdown → nodes
// thread.js message.js composer.js sidebar.js settings.js models.js dialogs.js notices.js    the views

import { App } from "./app.js";
import { byId, el } from "./dom.js";
import { openStore } from "./store.js";

const EXAMPLES = [
  "Explain how a heat pump works, as if to a curious child",
  "Write a polite reply that declines an invitation",
  "Show me a Python function that counts the words of a file",
];

const app = new App(await openStore());

const local = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
byId("empty-note").textContent = local
  ? "The model runs on this machine. What you write does not leave it."
  : `The model runs on ${location.hostname}. Your conversations are kept in this browser only.`;
for (const text of EXAMPLES) {
  byId("examples").append(el("li", {}, el("button", { type: "button", on: { click: () => app.send(text) } }, text)));
}

byId("new-chat-small").addEventListener("click", () => app.newChat());
byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address holds the conversation
  byId("prompt").focus();
});
addEventListener("keydown", (event) => {
  if (event.isComposing || document.querySelector("dialog[open], [popover]:popover-open")) return;
  if (event.key === "Escape" && app.stop()) event.preventDefault();
  if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    app.newChat();
  }
});
addEventListener("pagehide", () => app.leave());

await app.start();
