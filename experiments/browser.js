"use strict";
// Every string from a record enters the page through textContent or title, never as markup.
const runs = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { shown: [], at: 0 };
const total = (s) => ("reward" in s ? s.reward : Object.values(s.rewards || {}).reduce((a, b) => a + (b || 0), 0));
const text = (s) => (s.completion !== undefined ? s.completion : s.tokens.join(""));
const signed = (x) => (x > 0 ? "+" : "") + Number(x.toPrecision(3));

function option(select, value, label) {
  const one = document.createElement("option");
  one.value = value;
  one.textContent = label;
  select.append(one);
}

function chooseRun() {
  const run = runs[$("run").value];
  const tiers = [...new Set(run.samples.map((s) => s.tier))];
  const before = $("tier").value;
  $("tier").replaceChildren();
  option($("tier"), "", "all");
  tiers.forEach((tier) => option($("tier"), tier, tier));
  $("tier").value = tiers.includes(before) ? before : "";
  filter();
}

function filter() {
  const run = runs[$("run").value];
  const tier = $("tier").value, reward = $("reward").value, words = $("text").value.toLowerCase();
  const values = run.samples.map(total);
  const high = Math.max(...values), low = Math.min(...values);
  state.shown = run.samples.filter((s) => {
    const value = total(s);
    const fits = { "": true, high: value >= high, low: value <= low, middle: value < high && value > low }[reward];
    return fits && (!tier || s.tier === tier) && (!words || (s.prompt + "\n" + text(s)).toLowerCase().includes(words));
  });
  state.at = 0;
  show();
}

function fact(name, value) {
  const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
  dt.textContent = name;
  dd.textContent = value;
  box.append(dt, dd);
  $("facts").append(box);
}

function colour(span, advantage, scale) {
  const share = Math.min(1, Math.abs(advantage) / scale);
  const hue = advantage > 0 ? "--plus" : "--minus";
  if (share > 0) span.style.background = `rgba(var(${hue}), ${(0.08 + 0.67 * share).toFixed(3)})`;
}

function show() {
  const count = state.shown.length, run = runs[$("run").value];
  $("place").textContent = count ? `${state.at + 1} of ${count}` : "none";
  $("facts").replaceChildren();
  $("completion").replaceChildren();
  $("prompt").textContent = "";
  $("hover").textContent = "";
  $("least").textContent = signed(-run.scale);
  $("most").textContent = signed(run.scale);
  if (!count) return;
  const s = state.shown[state.at];
  const facts = { step: s.step, tier: s.tier, row: s.row_id, group: s.group_id, finish: s.finish, length: s.length };
  Object.entries(facts).forEach(([name, value]) => value !== undefined && value !== null && fact(name, value));
  Object.entries(s.rewards || {}).forEach(([name, value]) => fact(`reward ${name}`, value === null ? "none" : signed(value)));
  $("prompt").textContent = s.prompt;
  if (!s.tokens || !s.tokens.length) {
    $("completion").textContent = text(s);
    return;
  }
  s.tokens.forEach((token, i) => {
    const span = document.createElement("span"), a = (s.advantages || [])[i];
    span.textContent = token;
    if (typeof a === "number") {
      span.title = `advantage ${signed(a)}`;
      colour(span, a, run.scale);
      span.addEventListener("mouseenter", () => ($("hover").textContent = `token ${i + 1}: ${signed(a)}`));
    }
    $("completion").append(span);
  });
}

function move(by) {
  if (!state.shown.length) return;
  state.at = (state.at + by + state.shown.length) % state.shown.length;
  show();
}

runs.forEach((run, i) => option($("run"), i, run.name));
$("run").addEventListener("change", chooseRun);
["tier", "reward"].forEach((id) => $(id).addEventListener("change", filter));
$("text").addEventListener("input", filter);
$("prev").addEventListener("click", () => move(-1));
$("next").addEventListener("click", () => move(1));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === $("text")) {
    if (event.key === "Escape") $("text").blur();
    return;
  }
  if (event.target.tagName === "SELECT") return;
  const by = { ArrowLeft: -1, k: -1, ArrowRight: 1, j: 1 }[event.key];
  if (by) move(by);
  if (event.key === "/") {
    event.preventDefault();
    $("text").focus();
  }
});
if (runs.length) chooseRun();
