// Building nodes. Strings become text nodes: nothing in this page ever parses HTML.

/** The element of the page with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element. Attributes that are undefined, null or false are left out; `on` holds listeners.
 * Children that are null or undefined are left out.
 */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") {
      for (const [type, listener] of Object.entries(value)) element.addEventListener(type, listener);
    } else if (value !== undefined && value !== null && value !== false) {
      element.setAttribute(key, value === true ? "" : value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the symbols of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows only an icon; `label` is its name. */
export function iconButton(name, label, action) {
  const button = el("button", { class: "icon-button", type: "button", "aria-label": label, title: label });
  button.append(icon(name));
  if (action) button.addEventListener("click", action);
  return button;
}

export function textButton(label, action, kind = "button") {
  return el("button", { class: kind, type: "button", on: { click: action } }, label);
}

/** Copies text and lets the button say so for a moment. */
export async function copy(text, button) {
  const done = await writeClipboard(text);
  announce(done ? "Copied" : "Copying is not possible in this browser");
  if (!done) return;
  button.classList.add("copied");
  setTimeout(() => button.classList.remove("copied"), 1600);
}

async function writeClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers give the clipboard to secure origins only: a server on the local network is none.
  }
  const field = el("textarea", { class: "heard", "aria-hidden": "true" });
  field.value = text;
  const focused = document.activeElement;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return done;
}

/** Says something to a screen reader, after what it is saying now. */
export function announce(text) {
  if (text) byId("announcer").append(el("p", {}, text));
}

export function clearAnnouncements() {
  byId("announcer").replaceChildren();
}

/** Offers a file for download. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
