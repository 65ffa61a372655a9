// Markdown → nodes. marked's lexer reads it, its HTML is never made: nodes are built from the tokens, so
// that whatever a model writes is text. Links lead to http, https and mailto; images are links, never fetched.

import { Lexer } from "./vendor/marked.esm.js";
import { el, icon } from "./dom.js";

const OPTIONS = { gfm: true, breaks: true };
const MAX_DEPTH = 24; // deeper nesting is shown as it was written
const PROTOCOLS = new Set(["http:", "https:", "mailto:"]);
const ENTITIES = {
  amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", reg: "®", deg: "°", times: "×",
  divide: "÷", plusmn: "±", micro: "µ", middot: "·", bull: "•", hellip: "…", ndash: "–", mdash: "—", lsquo: "‘",
  rsquo: "’", ldquo: "“", rdquo: "”", laquo: "«", raquo: "»", larr: "←", rarr: "→", le: "≤", ge: "≥", ne: "≠",
  euro: "€", pound: "£",
};

/** The nodes of a whole text. */
export function renderMarkdown(text) {
  return tokensOf(normal(text)).flatMap((token) => block(token, 0));
}

/**
 * Markdown that is still growing. Blocks that are complete are built once; the last one is built again at
 * most once a frame and patched into place, so that selections, scroll positions and focus stay.
 */
export class MarkdownStream {
  /** `onBlock` is told the text of each block that is complete. */
  constructor(container, onBlock = () => {}) {
    this.container = container;
    this.onBlock = onBlock;
    this.text = "";
    this.settledChars = 0;
    this.settledNodes = 0;
    this.defines = false;
    this.frame = 0;
    this.notBefore_ms = 0;
  }

  push(text) {
    this.text += normal(text);
    this.frame ||= requestAnimationFrame(() => this.#onFrame());
  }

  /** Renders what has come so far, without waiting for a frame. */
  flush() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.#render(false);
  }

  /** The same, and the text is complete. */
  end() {
    cancelAnimationFrame(this.frame);
    this.#render(true);
    if (this.defines) patch(this.container, renderMarkdown(this.text)); // links that are defined further down
  }

  #onFrame() {
    this.frame = 0;
    const begin_ms = performance.now();
    if (begin_ms < this.notBefore_ms) {
      this.frame = requestAnimationFrame(() => this.#onFrame());
      return;
    }
    this.#render(false);
    const end_ms = performance.now();
    this.notBefore_ms = end_ms + 3 * (end_ms - begin_ms); // a block that is slow to build leaves time for the rest
  }

  #render(ended) {
    const tokens = tokensOf(this.text.slice(this.settledChars));
    this.defines ||= tokens.some((token) => token.type === "def");
    const open = ended ? tokens.length : firstOpen(tokens);
    for (const token of tokens.slice(0, open)) {
      const nodes = block(token, 0);
      patch(this.container, nodes, this.settledNodes, true);
      nodes.forEach((_, index) => this.onBlock(spoken(this.container.childNodes[this.settledNodes + index])));
      this.settledNodes += nodes.length;
      this.settledChars += token.raw.length;
    }
    const tail = tokens.slice(open).flatMap((token) => block(token, 0));
    patch(this.container, tail, this.settledNodes);
  }
}

/**
 * The index of the first block that may still change: the last that is not space, as a list goes on behind an
 * empty line. Where its first line is not complete, also the one before it: "3" becomes "3. ", another item.
 */
function firstOpen(tokens) {
  const isBlock = (token) => token.type !== "space";
  const last = tokens.findLastIndex(isBlock);
  const open = last < 0 || tokens[last].raw.includes("\n") ? last : tokens.slice(0, last).findLastIndex(isBlock);
  return Math.max(0, open);
}

/** What a screen reader says of a block. */
function spoken(node) {
  if (!node.matches?.(".code")) return node.innerText ?? node.textContent;
  const lines = node.querySelector("code").textContent.split("\n").length;
  return `Code block, ${node.dataset.language || "plain text"}, ${lines} ${lines === 1 ? "line" : "lines"}.`;
}

function tokensOf(text) {
  try {
    const tokens = Lexer.lex(text, OPTIONS);
    // Offsets are counted in raw characters, so they have to be those of the text.
    if (tokens.reduce((sum, token) => sum + token.raw.length, 0) === text.length) return tokens;
  } catch {
    // Nested beyond what the lexer's recursion can take.
  }
  return [{ type: "html", raw: text, text }];
}

const normal = (text) => text.replaceAll("\r", "");

function block(token, depth) {
  if (depth > MAX_DEPTH) return [raw(token)];
  const blocks = (tokens) => tokens.flatMap((each) => block(each, depth + 1));
  const inlines = (tokens) => inline(tokens, depth + 1);
  switch (token.type) {
    case "space":
    case "def":
    case "checkbox":
      return [];
    case "heading":
      // The page's title and the messages' are above it.
      return [el(`h${Math.min(token.depth + 2, 6)}`, { class: `h h${token.depth}` }, ...inlines(token.tokens))];
    case "paragraph":
      return [el("p", {}, ...inlines(token.tokens))];
    case "text":
      return inlines(token.tokens ?? [token]);
    case "code":
      return [code(token)];
    case "blockquote":
      return [el("blockquote", {}, ...blocks(token.tokens))];
    case "list":
      return [list(token, blocks)];
    case "table":
      return [table(token, inlines)];
    case "hr":
      return [el("hr")];
    default:
      return [raw(token)];
  }
}

const raw = (token) => el("p", { class: "raw" }, token.raw.replace(/\n+$/, ""));

function code(token) {
  const language = /^[\w+#.-]*/.exec(token.lang ?? "")[0].slice(0, 24);
  const button = el("button", { class: "copy-code", type: "button", "data-action": "copy-code" }, icon("copy"), icon("check"), "Copy");
  if (language) button.setAttribute("aria-label", `Copy the ${language} code`);
  else button.setAttribute("aria-label", "Copy the code");
  const label = el("span", {}, language || "text");
  const pre = el("pre", { tabindex: "0", role: "group", "aria-label": `Code, ${language || "text"}` }, el("code", {}, token.text));
  return el("div", { class: "code", "data-language": language }, el("div", { class: "code-head" }, label, button), pre);
}

function list(token, blocks) {
  const items = token.items.map((item) => {
    const box = item.task && el("input", { type: "checkbox", disabled: true, checked: item.checked, "aria-label": item.checked ? "done" : "to do" });
    return el("li", { class: item.task ? "task" : null }, box || null, ...blocks(item.tokens));
  });
  const start = token.ordered && token.start !== 1 && token.start !== "" ? token.start : null;
  return el(token.ordered ? "ol" : "ul", { start }, ...items);
}

function table(token, inlines) {
  const row = (cells, name) =>
    el("tr", {}, ...cells.map((cell) => el(name, { class: cell.align && `to-${cell.align}`, scope: name === "th" ? "col" : null }, ...inlines(cell.tokens))));
  const head = el("thead", {}, row(token.header, "th"));
  const body = el("tbody", {}, ...token.rows.map((cells) => row(cells, "td")));
  return el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, el("table", {}, head, body));
}

function inline(tokens, depth) {
  if (depth > MAX_DEPTH) return [tokens.map((token) => token.raw).join("")];
  const inner = (token) => inline(token.tokens ?? [], depth + 1);
  return tokens.map((token) => {
    switch (token.type) {
      case "text":
        if (token.tokens) return inner(token);
        return token.escaped ? token.text : decoded(token.text);
      case "escape":
        return token.text;
      case "strong":
      case "em":
      case "del":
        return el(token.type, {}, ...inner(token));
      case "codespan":
        return el("code", {}, token.text);
      case "br":
        return el("br");
      case "link":
        return link(token, inner(token));
      case "image":
        return link(token, [`Image: ${decoded(token.text) || token.href}`]);
      case "checkbox":
        return [];
      default:
        return token.raw;
    }
  }).flat();
}

/** A link that leads where it may, else what was written. */
function link(token, children) {
  const href = safeAddress(token.autolink ? token.href : decoded(token.href));
  if (href === null) return token.raw;
  return el("a", { href, target: "_blank", rel: "noopener noreferrer", title: token.title && decoded(token.title) }, ...children);
}

/** A whole address of a protocol that cannot run anything, or null. */
function safeAddress(text) {
  try {
    const url = new URL(text);
    return PROTOCOLS.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function decoded(text) {
  return text.replace(/&(?:#(\d{1,7})|#[xX]([\da-fA-F]{1,6})|(\w{2,6}));/g, (whole, decimal, hex, name) => {
    if (name) return Object.hasOwn(ENTITIES, name) ? ENTITIES[name] : whole;
    const point = decimal ? Number(decimal) : Number.parseInt(hex, 16);
    return point > 0 && point <= 0x10ffff && !(point >= 0xd800 && point < 0xe000) ? String.fromCodePoint(point) : "\ufffd";
  });
}

/** Makes the children of `parent` from index `from` on look like `nodes`, and keeps those that do already. */
function patch(parent, nodes, from = 0, keepRest = false) {
  nodes.forEach((node, index) => {
    const old = parent.childNodes[from + index];
    const fresh = typeof node === "string" ? document.createTextNode(node) : node;
    if (!old) parent.append(fresh);
    else if (!reuse(old, fresh)) old.replaceWith(fresh);
  });
  while (!keepRest && parent.childNodes.length > from + nodes.length) parent.lastChild.remove();
}

function reuse(old, fresh) {
  if (old.nodeName !== fresh.nodeName || !sameAttributes(old, fresh)) return false;
  if (old.nodeType === Node.TEXT_NODE) {
    if (fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.data.length));
    else old.data = fresh.data;
  } else {
    patch(old, [...fresh.childNodes]);
  }
  return true;
}

function sameAttributes(old, fresh) {
  const before = old.attributes ?? [];
  const after = fresh.attributes ?? [];
  return before.length === after.length && [...after].every(({ name, value }) => old.getAttribute(name) === value);
}
