"use strict";
// Every string from a record enters the page through textContent, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { shown: [], at: 0 };
const POI = /poi_[A-Za-z0-9_]*\d/g;

function add(parent, tag, text, name) {
  const one = document.createElement(tag);
  if (text !== undefined) one.textContent = text;
  if (name) one.className = name;
  parent.append(one);
  return one;
}

function option(select, value, label) {
  add(select, "option", label).value = value;
}

function draw(parent, tag, attributes, text) {
  const one = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([name, value]) => one.setAttribute(name, value));
  if (text !== undefined) one.textContent = text;
  parent.append(one);
  return one;
}

function board() {
  const split = $("split").value;
  $("board").replaceChildren();
  const head = add(add($("board"), "thead"), "tr");
  ["model", "questions", "failed", ...data.columns].forEach((name) => add(head, "th", name));
  const body = add($("board"), "tbody");
  data.lines.filter((line) => line.split === split).forEach((line) => {
    const row = add(body, "tr");
    add(row, "td", line.model);
    add(row, "td", line.count);
    add(row, "td", line.failed);
    data.columns.forEach((name) => {
      const digits = data.counts.includes(name) ? 2 : 1, cell = add(row, "td");
      if (typeof line[name] !== "number") return;
      cell.textContent = line[name].toFixed(digits);
      const low = line[name + ".low"], high = line[name + ".high"];
      if (typeof low === "number") add(cell, "small", `${low.toFixed(digits)} to ${high.toFixed(digits)}`);
    });
  });
}

function bars() {
  const models = [...new Set(data.lines.map((line) => line.model))];
  const left = 230, width = 420, step = 22, gap = 12;
  const rows = models.map((model) => data.lines.filter((l) => l.model === model && data.levels.includes(l.split) && typeof l.correctness === "number"));
  const height = rows.reduce((sum, r) => sum + r.length * step + gap, 0) + 24;
  const svg = draw($("bars"), "svg", { width: left + width + 190, height, viewBox: `0 0 ${left + width + 190} ${height}`, role: "img", "aria-label": "correctness by level" });
  const x = (value) => left + (width * value) / 100;
  let y = 4;
  models.forEach((model, i) => {
    if (rows[i].length) draw(svg, "text", { x: left - 44, y: y + (rows[i].length * step) / 2 + 4, "text-anchor": "end" }, model.length > 26 ? model.slice(0, 25) + "…" : model);
    rows[i].forEach((line) => {
      const value = line.correctness, low = line["correctness.low"], high = line["correctness.high"];
      draw(svg, "text", { x: left - 8, y: y + 14, "text-anchor": "end", class: "soft" }, line.split);
      draw(svg, "rect", { x: left, y: y + 2, width: Math.max(0.5, x(value) - left), height: step - 6, rx: 2, class: `l${data.levels.indexOf(line.split)}` });
      const seen = typeof low === "number";
      if (seen) draw(svg, "line", { x1: x(low), x2: x(high), y1: y + step / 2 - 1, y2: y + step / 2 - 1, class: "whisker" });
      draw(svg, "text", { x: x(seen ? Math.max(high, value) : value) + 6, y: y + 14 }, value.toFixed(1) + (seen ? ` [${low.toFixed(1)}, ${high.toFixed(1)}]` : ""));
      y += step;
    });
    y += gap;
  });
  [0, 25, 50, 75, 100].forEach((value) => {
    svg.prepend(draw(svg, "line", { x1: x(value), x2: x(value), y1: 0, y2: height - 20, class: "axis" }));
    draw(svg, "text", { x: x(value), y: height - 6, "text-anchor": "middle", class: "soft" }, `${value} %`);
  });
}

function chooseRun() {
  const run = data.runs[$("run").value];
  [["level", (s) => s.level], ["city", (s) => s.city]].forEach(([id, value]) => {
    $(id).replaceChildren();
    option($(id), "", "all");
    [...new Set(run.samples.map(value))].sort().forEach((name) => option($(id), name, name));
  });
  filter();
}

const spelt = (s) => [s.question, s.completion || "", ...(s.turns || []).flatMap((t) => [t.text, t.result || ""])].join("\n").toLowerCase();

function filter() {
  const level = $("level").value, city = $("city").value, right = $("right").value, words = $("text").value.toLowerCase();
  state.shown = data.runs[$("run").value].samples.filter((s) =>
    (!level || s.level === level) && (!city || s.city === city) &&
    (!right || (s.score === 1) === (right === "1")) && (!words || spelt(s).includes(words)));
  state.at = 0;
  show();
}

function fact(parent, name, value) {
  const box = add(parent, "div");
  add(box, "dt", name);
  add(box, "dd", value);
}

// Ids are marked: those that a result of this transcript names, and those that none does.
function marked(parent, text, seen) {
  let from = 0;
  for (const match of text.matchAll(POI)) {
    parent.append(text.slice(from, match.index));
    add(parent, "mark", match[0], seen.has(match[0]) ? "" : "unseen");
    from = match.index + match[0].length;
  }
  parent.append(text.slice(from));
}

function transcript(s) {
  $("transcript").replaceChildren();
  const turns = s.turns && s.turns.length ? s.turns : [{ text: s.completion || "", result: null }];
  const seen = new Set();
  turns.forEach((turn, i) => {
    const wrote = add($("transcript"), "div", undefined, "turn model");
    add(wrote, "b", `model, round ${i + 1}`);
    marked(add(wrote, "pre"), turn.text, seen);
    if (turn.result === null || turn.result === undefined) return;
    const told = add($("transcript"), "div", undefined, "turn told");
    const first = turn.result.split("\n", 1)[0], box = add(told, "details");
    add(box, "summary", `tools: ${first.slice(0, 120)}`);
    for (const match of turn.result.matchAll(POI)) seen.add(match[0]);
    marked(add(box, "pre"), turn.result, seen);
  });
}

function show() {
  const count = state.shown.length;
  $("place").textContent = count ? `${state.at + 1} of ${count}` : "none";
  ["facts", "values", "transcript"].forEach((id) => $(id).replaceChildren());
  $("question").textContent = $("reference").textContent = "";
  if (!count) return;
  const s = state.shown[state.at];
  fact($("facts"), "question", s.id);
  fact($("facts"), "level", s.level);
  fact($("facts"), "city", s.city);
  fact($("facts"), "answer", s.score === 1 ? "right" : s.score === 0 ? "wrong" : "not scored");
  fact($("facts"), "finish", s.finish);
  $("question").textContent = s.question;
  $("reference").textContent = s.reference;
  transcript(s);
  Object.entries(s.values || {}).forEach(([name, value]) => typeof value === "number" && fact($("values"), name, Number(value.toPrecision(4))));
}

function move(by) {
  if (!state.shown.length) return;
  state.at = (state.at + by + state.shown.length) % state.shown.length;
  show();
}

[...new Set(data.lines.map((line) => line.split))].forEach((split) => option($("split"), split, split));
$("split").addEventListener("change", board);
board();
bars();
data.runs.forEach((run, i) => option($("run"), i, run.name));
$("run").addEventListener("change", chooseRun);
["level", "city", "right"].forEach((id) => $(id).addEventListener("change", filter));
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
if (data.runs.length) chooseRun();
