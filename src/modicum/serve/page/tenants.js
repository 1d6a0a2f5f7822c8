/* What tenants used and what it costs. */

import { $, count, h, moment, show, table } from "./dom.js";

export function showTenants({ tenants, currency, started, idle_cost: idle, you }) {
  $("tenants-title").textContent = you.sees_all ? "Usage and cost" : "Your usage";
  $("tenants-since").textContent = `Since the server started, ${moment(started)}.`;
  show($("tenant-list"), { tenants, currency, idle }, () => [
    table("Usage by tenant", columns(currency), rows(tenants, currency), "Nobody has asked for anything yet."),
    idle && currency ? h("p", { class: "small" }, `While nobody used it the machine cost ${money(idle, currency)} more.`) : null,
  ].filter((part) => part !== null));
}

const columns = (currency) => [
  ["Tenant", ""], ["Requests", "number"], ["Failed", "number"], ["Refused", "number"], ["Prompt tokens", "number"],
  ["of these cached", "number"], ["Generated tokens", "number"], ...(currency ? [["Cost", "number"]] : []),
];

function rows(tenants, currency) {
  return [...tenants].sort((one, other) => other.cost - one.cost || work(other) - work(one)).map((one) => {
    const { error = 0, timeout = 0, refused = 0 } = one.requests;
    const requests = Object.values(one.requests).reduce((sum, each) => sum + each, 0);
    return [one.name, ...[requests, error + timeout, refused, one.prompt_tokens, one.cached_tokens, one.generated_tokens].map(count),
      ...(currency ? [money(one.cost, currency)] : [])];
  });
}

const work = (one) => one.prompt_tokens + one.generated_tokens;
const money = (amount, currency) =>
  `${amount.toLocaleString("en", amount && amount < 0.01 ? { maximumSignificantDigits: 2 } : { minimumFractionDigits: 2, maximumFractionDigits: 2 })} ${currency}`;
