/* The last minutes of the server: tiles and plots. */

import { $, bytes, count, h, percent, seconds, short, show } from "./dom.js";
import { Plot } from "./plots.js";

const KEPT = { fine: 600, coarse: 360 }, SPAN = { fine: 600, coarse: 3600 };
const whole = (value) => (Number.isInteger(value) ? count(value) : short(value));
const plots = [
  new Plot("Tokens per second", [{ name: "generated", field: "generated_tokens" }, { name: "prompts", field: "prompt_tokens" }], short, { least: 1 }),
  new Plot("Time to first token", [{ name: "median", field: "first_token_p50" }, { name: "95th percentile", field: "first_token_p95" }], seconds),
  new Plot("Time per token", [{ name: "median", field: "per_token_p50" }, { name: "95th percentile", field: "per_token_p95" }], seconds),
  new Plot("Requests at a time", [{ name: "running", field: "running" }, { name: "waiting", field: "waiting" }, { name: "sequences in a step", field: "batch" }], whole, { least: 4 }),
  new Plot("Requests per second", [{ name: "ended", field: "requests" }, { name: "failed", field: "errors" }, { name: "refused", field: "refused" }], short, { least: 1 }),
  new Plot("Memory", [{ name: "of the process", field: "memory" }], bytes, { least: 1024, binary: true }),
];
let frames = { fine: { at: [] }, coarse: { at: [] } };

export const after = (kind) => frames[kind].at.at(-1) ?? 0;
export function forget() { frames = { fine: { at: [] }, coarse: { at: [] } }; }

export function showLive(data, kind) {
  if ($("plots").childElementCount === 0) $("plots").append(...plots.map((plot) => plot.element));
  const known = frames[kind];
  for (const [field, values] of Object.entries(data.frames)) {
    known[field] = [...(known[field] ?? []), ...values].slice(-KEPT[kind]);
  }
  for (const plot of plots) plot.update(known, SPAN[kind], data.at);
  show($("tiles"), tiles(data, frames[kind]), (all) =>
    all.map(([name, value, more]) => h("div", {}, h("dt", {}, name), h("dd", {}, value, more ? h("small", {}, more) : null))));
}

function tiles({ now, model }, known) {
  const last = (field) => known[field]?.at(-1) ?? null;
  const asked = now.pool.hits + now.pool.misses;
  return [
    ["Tokens per second", short(last("generated_tokens")), `${short(last("requests"))} requests`],
    ["First token", seconds(last("first_token_p50")), `95 %: ${seconds(last("first_token_p95"))}`],
    ["Per token", seconds(last("per_token_p50")), `95 %: ${seconds(last("per_token_p95"))}`],
    ["Running", `${count(now.running)} of ${count(model.max_batch)}`, `${count(now.waiting)} waiting`],
    ["Adapters in memory", `${count(now.pool.used)} of ${count(now.pool.slots)}`,
      asked ? `${percent(now.pool.hits / asked)} found there` : `${count(now.pool.pinned)} pinned`],
    ["Key/value cache", percent(now.cache_used), "held by requests"],
    ["Memory", bytes(now.memory.resident), now.memory.gpu === undefined ? "of the process" : `GPU: ${bytes(now.memory.gpu)}`],
  ];
}
