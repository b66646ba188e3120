// The data of the pages, loaded as scripts: a page that was opened from a file can read no others.
"use strict";

const view = {
  runs: [],
  // By the name of a sheet: why its frames are not there.
  noMedia: {},
  // By "run step": the groups of a step that is there, and the promise of one that is awaited.
  _groups: new Map(),
  _awaited: new Map(),

  // Called by steps/index.js, steps/media.js and steps/run0/step_N.js.
  index(index) {
    view.runs = index.runs;
    for (const run of view.runs) run.prompts = new Map(run.prompts);
  },
  media(reasons) { view.noMedia = reasons; },
  step(run, step, groups) {
    for (const group of groups) Object.assign(group, { run, step });
    view._groups.set(`${run} ${step}`, groups);
  },

  // The groups of one step; none where the run has no such step.
  load(run, step) {
    const key = `${run} ${step}`;
    if (!view.runs[run].steps.some((one) => one.step === step)) return Promise.resolve([]);
    if (!view._awaited.has(key)) {
      view._awaited.set(key, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = `steps/run${run}/step_${step}.js`;
        script.onload = () => { script.remove(); resolve(view._groups.get(key)); };
        script.onerror = () => {
          view._awaited.delete(key);
          reject(new Error(`${script.src} is missing: run nemo-care view again`));
        };
        document.head.append(script);
      }));
    }
    return view._awaited.get(key);
  },

  // The groups of several steps, in their order.
  async loadAll(run, steps) {
    const found = await Promise.all(steps.map((step) => view.load(run, step)));
    return found.flat();
  },

  // What the search looks at: of the question, and of each completion.
  textsOf(group) {
    if (!group.texts) {
      const options = group.options.map((option) => option.slice(0, 2).join(" "));
      const question = [group.id, group.question || "", ...options];
      group.texts = {
        question: question.join("\n").toLowerCase(),
        completions: group.completions.map((one) => view.textOf(one).toLowerCase()),
      };
    }
    return group.texts;
  },

  textOf(completion) {
    return completion.parts.map(([, content]) => (
      typeof content === "string" ? content : content.map(([text]) => text).join("")
    )).join("");
  },

  FILTERS: {
    noSignal: "without signal",
    inconsistent: "right but inconsistent",
    wrong: "wrong",
    truncated: "truncated",
    unanswered: "no answer",
  },

  has(group, completion, filter) {
    return filter === "noSignal" ? group.noSignal : completion.flags.includes(filter);
  },

  // The places of a group's completions that all filters and the query leave.
  matching(group, filters, query) {
    const texts = query && view.textsOf(group);
    const found = [];
    group.completions.forEach((completion, place) => {
      if (!filters.every((filter) => view.has(group, completion, filter))) return;
      if (query && !texts.question.includes(query) && !texts.completions[place].includes(query)) {
        return;
      }
      found.push(place);
    });
    return found;
  },
};
