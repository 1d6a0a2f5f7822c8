/* Who looks, what they may see, and when it is asked for again. */

import { $, say, wipe } from "./dom.js";
import { after, forget, showLive } from "./live.js";
import { showTenants } from "./tenants.js";
import { forgetAdapters, showAdapters, startAdapters } from "./adapters.js";
import { showExperiments } from "./experiments.js";

const KEY = "modicum-key";
let paused = false, looking = false, again = false, timer = 0, slow = 0, failures = 0;

/* the answer to a request, as JSON; what is wrong is an error with the server's sentence and its status */
export async function call(path, method = "GET", body) {
  const key = sessionStorage.getItem(KEY);
  const headers = { Accept: "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method, headers, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store", credentials: "omit", redirect: "error",
  });
  const said = await answer.json().catch(() => null);
  if (!answer.ok) {
    throw Object.assign(new Error(said?.error?.message ?? `the server answered ${answer.status}`), { status: answer.status });
  }
  return said;
}

/* what a button does: ask, act, say what came of it, show how it stands now */
export async function act(done, path, method = "POST", body) {
  try {
    const answer = await call(path, method, body);
    say(typeof done === "function" ? done(answer) : done);
    return answer;
  } catch (error) {
    say(error.message, true);
    return null;
  } finally {
    slow = 0;
    schedule(0);
  }
}

const span = () => document.querySelector("input[name=span]:checked").value;

/* one look at a time, or frames would come twice */
export async function look(all = false) {
  if (all) slow = 0;
  again = looking;
  if (document.hidden || looking) return;
  looking = true;
  await once();
  looking = false;
  if (again) await look();
}

async function once() {
  const kind = span();
  try {
    const data = await call(`/page/live?after=${after(kind)}&coarse=${kind === "coarse"}`);
    if (failures) say("The server answers again.");
    failures = 0;
    welcome(data);
    if (data.you.sees_all) showLive(data, kind);
    showTenants(data);
    if (data.you.admin && slow-- <= 0) {
      slow = span() === "coarse" ? 1 : 9;
      await Promise.all([showAdapters(), showExperiments()]);
    }
  } catch (error) {
    if (error.status === 401) { enter(error); return; }
    failures += 1;
    say(error.status ? error.message : "The server does not answer; trying again.", true);
  }
  schedule(Math.min(30, (span() === "coarse" ? 5 : 1) * 2 ** failures));
}

function schedule(wait) {
  clearTimeout(timer);
  if (!paused || wait === 0) timer = setTimeout(look, wait * 1000);
}

function welcome({ you, model }) {
  $("login").hidden = true;
  $("model").textContent = model ? `serves ${model.name}` : "";
  $("name").textContent = you.admin ? `${you.name} (admin)` : you.name;
  $("who").hidden = false;
  $("leave").hidden = !sessionStorage.getItem(KEY);
  $("live").hidden = !you.sees_all;
  $("tenants").hidden = false;
  $("adapters").hidden = $("experiments").hidden = !you.admin;
}

function enter(error) {
  clearTimeout(timer);
  const tried = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  for (const id of ["live", "tenants", "adapters", "experiments", "who"]) $(id).hidden = true;
  for (const id of ["tiles", "tenant-list", "residents", "adapter-detail", "experiment-list", "names"]) wipe($(id));
  $("model").textContent = $("name").textContent = "";
  forget();
  forgetAdapters();
  say("");
  $("key-fault").textContent = tried && error ? "This key is not valid." : "";
  $("login").hidden = false;
  $("key").value = "";
  $("key").focus();
}

$("login-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  /* what no header can hold is no key */
  sessionStorage.setItem(KEY, /^[\x21-\x7e]+$/.test(key) ? key : "-");
  look().then(() => { if (!$("who").hidden) $("main").focus(); });
});
$("leave").addEventListener("click", () => { sessionStorage.removeItem(KEY); enter(); });
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Go on" : "Pause";
  if (paused) clearTimeout(timer);
  else schedule(0);
});
for (const choice of document.querySelectorAll("input[name=span]")) choice.addEventListener("change", () => schedule(0));
document.addEventListener("visibilitychange", () => { if (!document.hidden) schedule(0); });
startAdapters();
look();
