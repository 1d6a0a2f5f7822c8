/* Experiments: arms with intervals, and the buttons that end them. */

import { $, ask, count, digits, h, moment, percent, seconds, show, svg, table } from "./dom.js";
import { act, call } from "./app.js";

const WIDTH = 150, EDGE = 6;
const path = (name, action = "") => `/admin/experiments/${name.split("/").map(encodeURIComponent).join("/")}${action}`;

export async function showExperiments() {
  const { experiments } = await call("/admin/experiments");
  show($("experiment-list"), experiments, () =>
    experiments.length ? experiments.map(card) : [h("p", { class: "small" }, "There are none. `modicum experiment create` makes one.")]);
}

function card(one) {
  const title = `experiment-${one.name}`;
  const running = one.state === "running";
  return h("article", { class: "card", "aria-labelledby": title },
    h("div", { class: "head" },
      h("h3", { id: title }, one.name),
      one.shadow ? h("span", { class: "badge" }, "shadow") : null,
      h("span", { class: `badge ${running ? "on" : ""}` }, one.state)),
    h("p", { class: "small" }, told(one)),
    arms(one),
    h("div", { class: "buttons" }, buttons(one)));
}

function told(one) {
  const said = [`Outcome: ${one.feedback}, of ${count(one.rated_users)} users`];
  if (one.started) said.push(`since ${moment(one.started)}`);
  if (one.ended) said.push(`ended ${moment(one.ended)}`);
  const rest = [
    one.reason ? `${one.reason}.` : null,
    one.winner ? `Winner: ${one.winner}.` : null,
    one.sample_ratio_p !== null && one.sample_ratio_p < 0.01 ? "Users are not spread as the weights say: something is wrong with the assignment." : null,
  ];
  return `${said.join(", ")}. ${rest.filter(Boolean).join(" ")}`;
}

function arms(one) {
  const scale = scaleOf(one.arms.map((arm) => arm.outcome));
  const sure = percent(1 - one.alpha);
  const columns = [["Arm", ""], ["Weight", "number"], ["Users", "number"], ["Requests", "number"],
    [`Outcome (${sure})`, "number"], [`${scale.low.toFixed(2)} … ${scale.high.toFixed(2)}`, ""], ["Against the control", ""],
    ["Errors", "number"], ["95 % within", "number"], ...(one.shadow ? [["Agreement", "number"]] : [])];
  const rows = one.arms.map((arm, index) => [
    [h("span", {}, arm.label), h("small", {}, `${arm.version ?? "the base model"}${arm.control ? ", the control" : ""}`)],
    digits(arm.weight), count(arm.users),
    count(arm.requests), interval(arm.outcome), drawn(arm.outcome, scale, index), against(arm),
    percent(arm.error_rate.value), seconds(arm.seconds.p95),
    ...(one.shadow ? [percent(arm.agreement)] : []),
  ]);
  return table(`Arms of ${one.name}`, columns, rows, "");
}

const known = (value) => value !== null && value !== undefined;
const interval = ({ value, low, high }) =>
  known(value) ? `${value.toFixed(3)} (${[low, high].map((end) => (known(end) ? end.toFixed(3) : "?")).join(" … ")})` : "–";

function against(arm) {
  if (arm.control || !arm.difference || !known(arm.difference.value)) return "–";
  const { value, low, high } = arm.difference;
  const sign = (one) => `${one < 0 ? "−" : "+"}${Math.abs(one).toFixed(3)}`;
  return `${arm.verdict}: ${sign(value)} (${sign(low)} … ${sign(high)})`;
}

function scaleOf(all) {
  const ends = all.flatMap(({ value, low, high }) => [value, low, high]).filter(known);
  const low = Math.max(0, Math.floor(Math.min(1, ...ends) * 20) / 20), high = Math.ceil(Math.max(0, ...ends) * 20) / 20;
  return ends.length && high > low ? { low, high } : { low: 0, high: 1 };
}

/* a line from end to end of the interval, and a dot where the mean is */
function drawn({ value, low, high }, scale, index) {
  if (!known(value)) return "";
  const x = (one) => EDGE + (WIDTH - 2 * EDGE) * ((one - scale.low) / (scale.high - scale.low));
  return svg("svg", { class: "interval", width: WIDTH, height: 16, viewBox: `0 0 ${WIDTH} 16`, "aria-hidden": "true" },
    svg("path", { class: "rule", d: `M${EDGE} 8H${WIDTH - EDGE}` }),
    svg("path", { class: `line span s${index % 3}`, d: `M${x(low ?? scale.low)} 8H${x(high ?? scale.high)}` }),
    svg("circle", { class: `mean s${index % 3}`, cx: x(value), cy: 8, r: 5 }));
}

function buttons(one) {
  const button = (text, title, question, action, done, body, key = action) => h("button", {
    type: "button", "data-key": `${one.name} ${key}`, "aria-label": `${text}: ${one.name}`,
    click: async () => { if (await ask(title, question, text)) await act(done, path(one.name, action), "POST", body); },
  }, text);
  switch (one.state) {
    case "draft":
      return [button("Start", `Start ${one.name}?`, "Its arms get their users from the next request on.", "/start", `${one.name} runs.`)];
    case "running":
      return [button("Stop", `Stop ${one.name}?`, "Everybody gets the control from the next request on. It cannot be started again.",
        "/stop", `${one.name} has stopped.`)];
    case "stopped":
      return one.arms.filter((arm) => arm.version && (!one.winner || arm.label === one.winner)).map((arm) =>
        button(one.winner ? `Promote the winner, ${arm.label}` : `Promote ${arm.label}`, `Promote ${arm.label} of ${one.name}?`,
          `${arm.version} becomes what everybody gets from the next request on.`, "/promote", `${arm.version} is in production.`,
          { arm: arm.label }, `/promote ${arm.label}`));
    case "promoted":
      return [button("Roll back", `Roll ${one.name} back?`, "Everybody gets again what was there before it was promoted.",
        "/rollback", `${one.name} is rolled back.`)];
    default:
      return [];
  }
}
