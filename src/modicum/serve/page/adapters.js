/* Adapters: what is in memory, the versions of one name, what happened to it, and the way back. */

import { $, ask, bytes, count, digits, h, moment, show, table } from "./dom.js";
import { act, call, look } from "./app.js";

const PRODUCTION = "production";
let chosen = null;
const path = (name, action = "") => `/admin/adapters/${name.split("/").map(encodeURIComponent).join("/")}${action}`;

export function startAdapters() {
  $("find").addEventListener("submit", (event) => {
    event.preventDefault();
    chosen = $("adapter").value.trim();
    look(true);
  });
}

export function forgetAdapters() {
  chosen = null;
  $("adapter").value = "";
}

export async function showAdapters() {
  const { adapters } = await call("/admin/adapters");
  show($("residents"), adapters, () => table("Adapters in memory", [["Version", ""], ["Method", ""], ["Rank", "number"],
    ["Size", "number"], ["Requests", "number"], ["Pinned", ""]],
  adapters.map((one) => [
    h("button", { type: "button", class: "link", "data-key": one.version, click: () => choose(one.version.split("@")[0]) }, one.version),
    one.method, count(one.rank), bytes(one.bytes), count(one.requests), one.pinned ? "yes" : "no",
  ]), "None; an adapter is loaded when it is asked for."));
  show($("names"), [...new Set(adapters.map((one) => one.version.split("@")[0]))].slice(0, 200),
    (names) => names.map((name) => h("option", { value: name })));
  if (chosen) await showVersions(chosen);
}

function choose(name) {
  $("adapter").value = chosen = name;
  look(true);
  $("find").scrollIntoView({ block: "nearest" });
}

async function showVersions(name) {
  let found;
  try {
    found = await call(path(name));
  } catch (error) {
    if (error.status === 401) throw error;
    found = { fault: error.message };
  }
  show($("adapter-detail"), { name, ...found }, detail);
}

function detail({ name, fault, versions, history }) {
  if (fault) return h("p", { class: "wrong", role: "alert" }, fault);
  const current = versions.find((one) => one.aliases.includes(PRODUCTION));
  return h("article", { class: "card", "aria-labelledby": "adapter-name" },
    h("div", { class: "head" },
      h("h3", { id: "adapter-name" }, name),
      current ? h("button", { type: "button", "data-key": "rollback", click: () => rollback(name, current) }, "Roll back") : null),
    table(`Versions of ${name}`, [["Version", ""], ["Production", ""], ["Aliases", ""], ["Metrics", ""], ["Stored", ""], ["By", ""],
      ["Method", ""], ["Size", "number"], ["Note", "wide"]],
    versions.map((one) => [
      String(one.version),
      one === current ? h("span", { class: "badge on" }, "now") : h("button", {
        type: "button", "data-key": `promote ${one.version}`, "aria-label": `Promote ${name} version ${one.version}`, click: () => promote(name, one),
      }, "Promote"),
      one.aliases.join(", ") || "–", Object.entries(one.metrics).map(([metric, value]) => `${metric} ${digits(value)}`).join(", ") || "–",
      moment(one.created), one.actor, one.method, bytes(one.bytes), one.note ?? "–",
    ]), "All versions were removed."),
    h("h4", {}, "History"),
    table(`History of ${name}`, [["When", ""], ["Who", ""], ["What", ""], ["Version", ""], ["Details", "wide"]],
      history.map((one) => [moment(one.at), one.actor, one.action, one.version === null ? "–" : String(one.version), details(one.detail)]),
      "Nothing has happened."));
}

/* what the store writes for itself is left out */
const details = (detail) => Object.entries(detail).filter(([key]) => !["nonce", "kind"].includes(key))
  .map(([key, value]) => `${key}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join(", ") || "–";

async function rollback(name, current) {
  const sure = await ask(`Roll ${name} back?`,
    `${PRODUCTION} points at version ${current.version}. It goes back to where it pointed before, from the next request on.`, "Roll back");
  if (sure) await act(({ version }) => `${PRODUCTION} of ${name} points at version ${version} again.`, path(name, "/rollback"), "POST",
    { alias: PRODUCTION, expected: current.version });
}

async function promote(name, one) {
  const sure = await ask(`Promote ${name} version ${one.version}?`, `It becomes what everybody gets from the next request on.`, "Promote");
  if (sure) await act(`${PRODUCTION} of ${name} points at version ${one.version}.`, path(name, "/promote"), "POST", { version: one.version });
}
