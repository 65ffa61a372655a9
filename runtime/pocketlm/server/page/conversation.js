// A conversation is plain data: {id, title, created, updated, model, system, settings, from, messages}.
// A message is {role: "user", content} or {role: "assistant", content, state, model?, finish?, error?, figures?},
// its state one of "streaming", "done", "stopped" and "failed". Messages before `from` are no longer sent.

/** The sampling settings of the panel, with the ranges that the engine takes. */
export const SETTINGS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, hint: "0 always takes the likeliest token; higher is more varied" },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.01, hint: "the likeliest tokens that share this probability" },
  { name: "top_k", label: "Top k", min: 0, step: 1, hint: "so many likeliest tokens; 0 is off" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, hint: "leaves out what is less likely than this share of the best" },
  { name: "max_tokens", label: "Longest answer", min: 1, step: 1, hint: "tokens; empty: until the context is full" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.1, max: 2, step: 0.05, hint: "above 1 avoids repeating; 1 is off" },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 32 - 1, step: 1, hint: "the same seed gives the same answer" },
];

export function newConversation({ system = "", settings = {} } = {}) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, model: null, system, settings: { ...settings }, from: 0, messages: [] };
}

// Not randomUUID: that exists on secure origins only.
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export const titleOf = (conversation) => conversation.title || "New chat";

/** A title from the first words. */
export function titleFrom(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  return line.length <= 60 ? line : `${line.slice(0, 59).trimEnd()}…`;
}

/**
 * The body of the request for the next answer. Only what is set is sent: the server refuses the rest. Without a
 * model (the list has not come yet) the server takes its first.
 */
export function requestFor(conversation, model) {
  const messages = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const { role, content } of conversation.messages.slice(conversation.from)) {
    const last = messages.at(-1);
    if (!content) continue; // an answer that failed before its first token
    if (last?.role === role) last.content += `\n\n${content}`; // templates want the roles to take turns
    else messages.push({ role, content });
  }
  const set = Object.entries(conversation.settings).filter(([, value]) => value !== null && value !== undefined);
  return { ...(model && { model }), messages, ...Object.fromEntries(set) };
}

/** Leaves out the oldest turns until at most the share `keep` of the characters is sent. False: nothing to leave out. */
export function leaveOutOldest(conversation, keep) {
  const { messages } = conversation;
  const chars = (from) => messages.slice(from).reduce((sum, { content }) => sum + content.length, 0);
  const starts = messages.flatMap(({ role }, index) => (role === "user" && index > conversation.from ? [index] : []));
  if (!starts.length) return false;
  const limit = keep * chars(conversation.from);
  conversation.from = starts.find((index) => chars(index) <= limit) ?? starts.at(-1);
  return true;
}

/** Ends the conversation before the message at `index`. */
export function truncate(conversation, index) {
  conversation.messages.length = index;
  if (conversation.from > index) conversation.from = 0;
}

const FORMAT = "pocketlm-conversations";

export function asJson(conversations) {
  return `${JSON.stringify({ format: FORMAT, version: 1, exported: new Date().toISOString(), conversations }, null, 2)}\n`;
}

export function asMarkdown(conversation) {
  const head = [`# ${titleOf(conversation)}`];
  if (conversation.system) head.push(`**System**\n\n${conversation.system}`);
  const turns = conversation.messages.map(({ role, content, model }) =>
    `**${role === "user" ? "You" : model ?? "Answer"}**\n\n${content}`);
  return `${[...head, ...turns].join("\n\n")}\n`;
}

/** A file name without anything that a file system minds. */
export function fileName(title, suffix) {
  const plain = title.normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 50);
  return `${plain || "conversation"}.${suffix}`;
}

/** The conversations of an exported file, each field checked. Raises Error with a sentence for the user. */
export function fromJson(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON. Choose one that was exported here.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) {
    throw new Error("This file holds no conversations of this page. Choose one that was exported here as JSON.");
  }
  if (file.version !== 1) throw new Error(`This file has version ${file.version}; this page reads version 1.`);
  return file.conversations.map(checked);
}

function checked(given, index) {
  const messages = given?.messages;
  const sound = Array.isArray(messages) && messages.every((each) =>
    ["user", "assistant"].includes(each?.role) && typeof each.content === "string");
  if (!sound) throw new Error(`Conversation ${index + 1} of this file is damaged. Nothing was imported.`);
  const text = (value) => (typeof value === "string" ? value : "");
  const time = (value) => (Number.isFinite(value) ? value : Date.now());
  const settings = Object.fromEntries(SETTINGS.map(({ name }) => [name, given.settings?.[name]]).filter(([, value]) => Number.isFinite(value)));
  return {
    id: /^[0-9a-f]{24}$/.test(given.id) ? given.id : newId(),
    title: text(given.title), created: time(given.created), updated: time(given.updated),
    model: text(given.model) || null, system: text(given.system), settings,
    from: Number.isInteger(given.from) && given.from >= 0 && given.from < messages.length ? given.from : 0,
    messages: messages.map(importedMessage),
  };
}

function importedMessage({ role, content, state, model, finish, figures }) {
  if (role === "user") return { role, content };
  return {
    role, content, state: state === "stopped" ? "stopped" : "done", model: typeof model === "string" ? model : null,
    finish: finish === "length" ? "length" : "stop", figures: figures && typeof figures === "object" ? figures : null,
  };
}

/** The same conversation under another id. */
export const withNewId = (conversation) => ({ ...conversation, id: newId() });
