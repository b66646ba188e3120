// The page: which step, which filters, and as many groups as one looks at.
"use strict";

const byId = (id) => document.getElementById(id);
const ALL = "all";
const BATCH = 12;  // groups that are drawn at once; scrolling draws the next
let rows = [];  // [[group or null, matching], ...] per row, a column per run
let drawn = 0;
let wanted = 0;  // counts the calls of show(), so that a slow one draws nothing

const atEnd = new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting) && drawn < rows.length) drawMore();
}, { rootMargin: "800px" });

function steps() {
  const numbers = new Set(view.runs.flatMap((run) => run.steps.map((one) => one.step)));
  return [...numbers].sort((a, b) => a - b);
}

// What is shown is in the address, so that it can be kept and sent.
function state() {
  const given = new URLSearchParams(location.hash.slice(1));
  const known = steps();
  const step = given.get("step");
  return {
    step: step === ALL ? ALL : known.includes(Number(step)) ? Number(step) : known[known.length - 1],
    prompt: given.get("prompt"),
    filters: (given.get("filters") || "").split(",").filter((name) => name in view.FILTERS),
    query: given.get("q") || "",
    compare: view.runs.length > 1 && given.get("compare") !== "0",
    tinted: given.get("tint") !== "0",
  };
}

function go(changes) {
  const next = { ...state(), ...changes };
  const given = new URLSearchParams({ step: next.step });
  if (next.prompt !== null) given.set("prompt", next.prompt);
  if (next.filters.length) given.set("filters", next.filters.join(","));
  if (next.query) given.set("q", next.query);
  if (view.runs.length > 1 && !next.compare) given.set("compare", "0");
  if (!next.tinted) given.set("tint", "0");
  // Without an entry for each letter of a search.
  history.replaceState(null, "", `#${given}`);
  return show();
}

async function groupsOf(run, { step, prompt }) {
  if (prompt === null) {
    return view.loadAll(run, step === ALL ? view.runs[run].steps.map((one) => one.step) : [step]);
  }
  const found = view.runs[run].prompts.get(prompt) || (step === ALL ? [] : [step]);
  return (await view.loadAll(run, found)).filter((group) => group.id === prompt);
}

// Groups of the same prompt and step beside each other; where a run has none, null.
function sideBySide(columns) {
  const byKey = new Map();
  columns.forEach((groups, column) => {
    const seen = {};
    for (const group of groups) {
      const key = `${group.step} ${group.id}`;
      seen[key] = (seen[key] || 0) + 1;
      const whole = `${key} ${seen[key]}`;
      if (!byKey.has(whole)) byKey.set(whole, { step: group.step, groups: columns.map(() => null) });
      byKey.get(whole).groups[column] = group;
    }
  });
  return [...byKey.values()].sort((a, b) => a.step - b.step).map((row) => row.groups);
}

async function show() {
  const now = state();
  const call = ++wanted;
  const runs = now.compare ? [...view.runs.keys()] : [0];
  let columns;
  try {
    columns = await Promise.all(runs.map((run) => groupsOf(run, now)));
  } catch (error) {
    byId("count").textContent = error.message;
    return;
  }
  if (call !== wanted) return;
  const query = now.query.trim().toLowerCase();
  const all = sideBySide(columns);
  rows = all.map((groups) => groups.map((group) => [
    group, group ? view.matching(group, now.filters, query) : [],
  ])).filter((row) => row.some(([, matching]) => matching.length));
  drawControls(now, columns);
  const cells = rows.flat();
  const completions = columns.flat().reduce((sum, group) => sum + group.completions.length, 0);
  const left = cells.reduce((sum, [, matching]) => sum + matching.length, 0);
  const groups = cells.filter(([, matching]) => matching.length).length;
  byId("count").textContent = `${left.toLocaleString("en")} of ${completions.toLocaleString("en")} `
    + `completions in ${groups.toLocaleString("en")} of ${columns.flat().length.toLocaleString("en")} groups`
    + (now.prompt === null ? "" : ` of prompt ${now.prompt}`);
  // On paper there are no buttons that show this.
  byId("shown").textContent = [
    now.step === ALL ? "all steps" : `step ${now.step}`, ...now.filters.map((name) => view.FILTERS[name]),
    query && `search: ${query}`,
  ].filter(Boolean).join(" · ");
  byId("groups").replaceChildren();
  drawn = 0;
  drawMore();
  document.body.dataset.shown = call;  // for tests, which wait for it
}

function drawMore() {
  const now = state();
  const box = byId("groups");
  const showStep = now.step === ALL || now.prompt !== null;
  const openPrompt = (prompt) => { go({ prompt, filters: [], query: "" }); scrollTo(0, 0); };
  for (const row of rows.slice(drawn, drawn + BATCH)) {
    box.append(make("div", { class: `pair ${row.length > 1 ? "two" : ""}` }, ...row.map(
      ([group, matching], run) => (group
        ? drawGroup(group, matching, {
          tinted: now.tinted, label: row.length > 1 ? "AB"[run] : null, showStep, openPrompt,
        })
        : make("p", { class: "absent" }, `${view.runs[run].name} did not sample this prompt here`)),
    )));
  }
  drawn = Math.min(rows.length, drawn + BATCH);
  const rest = rows.length - drawn;
  byId("show-more").hidden = !rest;
  byId("rest").textContent = rest ? `Not printed: ${rest.toLocaleString("en")} more prompts, `
    + "which the page draws when it is scrolled to its end" : "";
  // Asks again whether the end is in sight.
  atEnd.unobserve(byId("more"));
  atEnd.observe(byId("more"));
}

function drawControls(now, columns) {
  const select = byId("step");
  if (!select.options.length) {
    for (const step of steps().reverse()) select.append(new Option(step, step));
    if (select.options.length > 1) select.append(new Option("all steps", ALL));
  }
  select.value = now.step;
  const place = steps().indexOf(now.step);
  byId("before").disabled = place <= 0;
  byId("after").disabled = place < 0 || place === steps().length - 1;
  byId("leave").hidden = now.prompt === null;
  if (document.activeElement !== byId("search")) byId("search").value = now.query;
  byId("tint").checked = now.tinted;
  const hasTokens = columns.flat().some((group) => group.completions.some(
    (one) => one.parts.some(([, content]) => typeof content !== "string"),
  ));
  byId("tint").parentElement.hidden = !hasTokens;
  if (byId("compare")) byId("compare").checked = now.compare;
  byId("filters").replaceChildren(...Object.entries(view.FILTERS).map(([filter, name]) => {
    const count = columns.flat().reduce((sum, group) => sum + group.completions.filter(
      (completion) => view.has(group, completion, filter),
    ).length, 0);
    const pressed = now.filters.includes(filter);
    const unjudged = filter === "inconsistent" && !view.runs.some((run) => run.judged);
    return make("button", {
      "aria-pressed": String(pressed), "data-filter": filter, disabled: !count && !pressed,
      title: unjudged ? "only evaluation.judge=rule judges training's completions" : null,
      onclick: () => go({
        filters: pressed ? now.filters.filter((one) => one !== filter) : [...now.filters, filter],
      }),
    }, `${name} ${count.toLocaleString("en")}`);
  }));
  drawCurve(now);
}

// The share of right completions by step; a click opens one.
function drawCurve(now) {
  const known = steps();
  const svg = byId("curve");
  svg.toggleAttribute("hidden", known.length < 2 || now.prompt !== null);
  const shownRuns = now.compare ? view.runs : view.runs.slice(0, 1);
  svg.setAttribute("viewBox", `0 0 ${known.length} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren();
  const make = (name) => document.createElementNS("http://www.w3.org/2000/svg", name);
  shownRuns.forEach((run, number) => {
    const width = 0.9 / shownRuns.length;
    for (const one of run.steps) {
      const height = Math.max(0.04, one.right ?? 0);
      const bar = make("rect");
      bar.setAttribute("x", known.indexOf(one.step) + number * width);
      bar.setAttribute("y", 1 - height);
      bar.setAttribute("width", width);
      bar.setAttribute("height", height);
      bar.setAttribute("class", `${number ? "other" : ""} ${one.step === now.step ? "shown" : ""}`);
      const title = make("title");
      title.textContent = `step ${one.step}${view.runs.length > 1 ? ` of ${run.name}` : ""}: `
        + `${one.right === null ? "–" : `${Math.round(100 * one.right)}%`} right, `
        + `mean reward ${digits(one.reward)}, ${one.completions} completions`;
      bar.append(title);
      bar.addEventListener("click", () => go({ step: one.step }));
      svg.append(bar);
    }
  });
}

function move(by) {
  const known = steps();
  const place = known.indexOf(state().step) + by;
  if (state().step !== ALL && place >= 0 && place < known.length) go({ step: known[place], prompt: null });
}

byId("step").addEventListener("change", (event) => {
  go({ step: event.target.value === ALL ? ALL : Number(event.target.value), prompt: null });
});
byId("before").addEventListener("click", () => move(-1));
byId("after").addEventListener("click", () => move(1));
byId("leave").addEventListener("click", () => go({ prompt: null }));
byId("search").addEventListener("input", (event) => {
  clearTimeout(byId("search").pause);
  byId("search").pause = setTimeout(() => go({ query: event.target.value }), 150);
});
byId("tint").addEventListener("change", (event) => go({ tinted: event.target.checked }));
byId("compare")?.addEventListener("change", (event) => go({ compare: event.target.checked }));
byId("show-more").addEventListener("click", drawMore);
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select, textarea, .strip") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowLeft") move(-1);
  if (event.key === "ArrowRight") move(1);
});
addEventListener("hashchange", show);
show();
