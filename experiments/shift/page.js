"use strict";
// Every string from a text enters the page through textContent or title, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const signed = (x) => (x > 0 ? "+" : "") + Number(x.toPrecision(3));

function option(value, label) {
  const one = document.createElement("option");
  one.value = value;
  one.textContent = label;
  $("checkpoint").append(one);
}

function element(name, content) {
  const one = document.createElement(name);
  one.textContent = content;
  return one;
}

const moved = (entry, k) => entry.dp[k].reduce((sum, x) => sum + Math.abs(x), 0) / entry.dp[k].length;

function response(entry, k) {
  const pre = document.createElement("pre");
  pre.append(element("q", entry.prompt));
  entry.tokens.forEach((token, t) => {
    const span = element("span", token), dp = entry.dp[k][t], p = entry.p[t];
    const share = Math.min(1, Math.abs(dp) / data.scale);
    if (share > 0.02) span.style.background = `rgba(var(${dp > 0 ? "--plus" : "--minus"}), ${(0.08 + 0.67 * share).toFixed(3)})`;
    const facts = `p ${Number(p.toPrecision(3))} → ${Number((p + dp).toPrecision(3))} (${signed(dp)}), entropy ${entry.entropy[t]}, KL ${entry.kl[k][t]}`;
    span.title = facts;
    span.addEventListener("mouseenter", () => ($("hover").textContent = `token ${t + 1}: ${facts}`));
    pre.append(span);
  });
  return pre;
}

function show() {
  const k = Number($("checkpoint").value), words = $("text").value.toLowerCase();
  const shown = data.texts.filter((e) => !words || (e.prompt + e.tokens.join("")).toLowerCase().includes(words));
  if ($("order").value) shown.sort((a, b) => moved(b, k) - moved(a, k));
  $("place").textContent = `${shown.length} of ${data.texts.length}`;
  $("responses").replaceChildren();
  shown.forEach((entry) => {
    $("responses").append(element("h2", `${entry.id}: mean |Δp| ${Number(moved(entry, k).toPrecision(3))}`), response(entry, k));
  });
}

data.names.forEach((name, k) => option(k, name));
$("least").textContent = signed(-data.scale);
$("most").textContent = signed(data.scale);
["checkpoint", "order"].forEach((id) => $(id).addEventListener("change", show));
$("text").addEventListener("input", show);
show();
