// Questions to the user: a confirmation, and the API key.

import { useKey } from "./api.js";
import { byId } from "./dom.js";

/** Asks before something is lost. Resolves to whether it may be done. */
export function confirm(title, text, action) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = action;
  return new Promise((resolve) => {
    const end = (answer) => () => {
      dialog.onclose = null;
      dialog.close();
      resolve(answer);
    };
    byId("confirm-yes").onclick = end(true);
    byId("confirm-no").onclick = end(false);
    dialog.onclose = end(false); // Escape
    dialog.showModal();
    byId("confirm-no").focus();
  });
}

let asking = null;

/** Asks for the API key and keeps it. Resolves to whether one was given; callers at the same time share it. */
export function askForKey(error) {
  asking ??= ask(error).finally(() => {
    asking = null;
  });
  return asking;
}

function ask(error) {
  const dialog = byId("key");
  const field = byId("key-field");
  byId("key-wrong").hidden = error.code !== "invalid_api_key";
  field.value = "";
  return new Promise((resolve) => {
    const end = (given) => {
      dialog.onclose = null;
      dialog.close();
      resolve(given);
    };
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      useKey(field.value.trim(), byId("key-remember").checked);
      end(true);
    };
    byId("key-no").onclick = () => end(false);
    dialog.onclose = () => end(false); // Escape
    dialog.showModal();
    field.focus();
  });
}
