// What an answer has cost: speed and joules, and where those come from.

import { el } from "./dom.js";

const SCOPES = {
  wall: "what the plug delivers", device: "the whole device on battery", board: "the board's rails",
  soc: "the system on a chip", package: "the processor package (cores and uncore)", gpu: "the graphics card",
  process: "the server's share of the processor",
};

/** The figures of an answer, from the stream's last chunk and the page's own clock. Missing ones are null. */
export function figuresOf({ usage, timings }, { ttft_s, tokens_per_s }) {
  return {
    ttft_s,
    tokens_per_s: timings?.predicted_per_second ?? tokens_per_s,
    prefill_tokens_per_s: timings?.prompt_per_second ?? null,
    queue_ms: timings?.queue_ms ?? null,
    prompt_tokens: usage?.prompt_tokens ?? null,
    cached_tokens: usage?.prompt_tokens_details?.cached_tokens ?? null,
    completion_tokens: usage?.completion_tokens ?? null,
    total_tokens: usage?.total_tokens ?? null,
    energy: usage?.energy ?? null,
  };
}

const isNumber = Number.isFinite;
export const whole = (value) => Math.round(value).toLocaleString("en");

export function rate(tokens_per_s) {
  return `${tokens_per_s >= 100 ? whole(tokens_per_s) : tokens_per_s.toFixed(1)} tok/s`;
}

export const seconds = (value) => (value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(1)} s`);

/** Joules with so many digits as they are worth: two for an estimate. */
export function joules(value, kind) {
  const digits = kind === "estimated" ? 2 : 3;
  const [scaled, unit] = value < 1 ? [1000 * value, "mJ"] : value < 1000 ? [value, "J"] : [value / 1000, "kJ"];
  const rounded = Number(scaled.toPrecision(digits));
  return `${rounded < 10 ** (digits - 1) ? scaled.toPrecision(digits) : rounded} ${unit}`;
}

/** One line while the answer comes. */
export function liveLine({ tokens_per_s, ttft_s }) {
  if (!isNumber(ttft_s)) return "";
  const first = `first token ${seconds(ttft_s)}`;
  return isNumber(tokens_per_s) ? `${rate(tokens_per_s)} · ${first}` : first;
}

/** A line of figures that opens to all of them. */
export function figuresView(figures, model) {
  const summary = el("summary", {}, summaryOf(figures));
  const rows = [...rowsOf(figures, model), ...energyRows(figures)];
  const list = el("dl", {}, ...rows.flatMap(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]));
  return el("details", { class: "figures" }, summary, list);
}

function summaryOf({ tokens_per_s, ttft_s, energy }) {
  const parts = [];
  if (isNumber(tokens_per_s)) parts.push(rate(tokens_per_s));
  if (isNumber(ttft_s)) parts.push(`first token ${seconds(ttft_s)}`);
  if (isNumber(energy?.energy_j)) {
    const text = joules(energy.energy_j, energy.kind);
    parts.push(energy.kind === "estimated" ? `≈ ${text} estimated` : text);
  } else if (energy) parts.push("joules unknown");
  return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
}

function rowsOf(figures, model) {
  const rows = [];
  if (model) rows.push(["Model", model]);
  if (isNumber(figures.prompt_tokens)) {
    const cached = figures.cached_tokens > 0 ? `, ${whole(figures.cached_tokens)} of them from the cache` : "";
    const read = isNumber(figures.prefill_tokens_per_s) ? `, read at ${rate(figures.prefill_tokens_per_s)}` : "";
    rows.push(["Prompt", `${whole(figures.prompt_tokens)} tokens${cached}${read}`]);
  }
  if (isNumber(figures.completion_tokens)) {
    const speed = isNumber(figures.tokens_per_s) ? `, written at ${rate(figures.tokens_per_s)}` : "";
    rows.push(["Answer", `${whole(figures.completion_tokens)} tokens${speed}`]);
  }
  if (isNumber(figures.ttft_s)) {
    const queue = figures.queue_ms >= 10 ? `, ${seconds(figures.queue_ms / 1000)} of it in the queue` : "";
    rows.push(["First token", `after ${seconds(figures.ttft_s)}${queue}`]);
  }
  return rows;
}

function energyRows({ energy, completion_tokens }) {
  if (!energy) return [["Energy", "not known: the server tells it at the end of an answer"]];
  const source = energy.source && ["Source", `${energy.source}: ${SCOPES[energy.scope] ?? energy.scope}`];
  const notes = energy.flags?.length > 0 && ["Note", [...energy.flags].join("; ")];
  if (!isNumber(energy.energy_j)) {
    return [["Energy", `no figure: ${energy.reason ?? "no reason given"}`], source, notes].filter(Boolean);
  }
  const each = completion_tokens > 0 ? `, ${joules(energy.energy_j / completion_tokens, energy.kind)} a token` : "";
  const kind = energy.kind === "estimated" ? "estimated" : "measured";
  const interval = isNumber(energy.low_j) && isNumber(energy.high_j) && ["Interval", `${joules(energy.low_j, energy.kind)} to ${joules(energy.high_j, energy.kind)}`];
  const window = isNumber(energy.duration_s) && ["Window", `${seconds(energy.duration_s)}, ${(energy.energy_j / energy.duration_s).toPrecision(energy.kind === "estimated" ? 2 : 3)} W on average`];
  return [["Energy", `${joules(energy.energy_j, kind)}, ${kind}${each}`], interval, source, window, notes].filter(Boolean);
}
