// One group: what the model was asked and saw, and what it said.
"use strict";

const SHEET_ROOM = { video: [160, 120], image: [480, 360] };

function drawSheet(media) {
  const box = make("div", { class: "media" });
  const say = (reason) => box.append(
    make("p", { class: "soft" }, `${media.kind} ${media.path}: ${reason}`),
  );
  const reason = view.noMedia[media.sheet];
  // A server draws what is not drawn yet.
  const served = location.protocol.startsWith("http") && reason === "not drawn yet";
  if (reason && !served) {
    say(reason === "not drawn yet" ? "not drawn; nemo-care view --media N draws more" : reason);
    return box;
  }
  const image = new Image();
  image.onerror = () => say(reason || "its frames are missing; run nemo-care view again");
  image.onload = () => {
    const count = media.kind === "video" ? media.times.length : 1;
    const width = image.naturalWidth / count;
    const strip = make("div", { class: "strip", tabindex: "0", title: media.path });
    for (let place = 0; place < count; place += 1) {
      const frame = make("div", { class: "frame", role: "img", "aria-label": `frame ${place + 1}` });
      frame.style.width = `${width}px`;
      frame.style.height = `${image.naturalHeight}px`;
      frame.style.backgroundImage = `url("media/${media.sheet}")`;
      frame.style.backgroundPosition = `${-width * place}px 0`;
      const time = media.kind === "video" ? `${media.times[place].toFixed(1)} s` : "image";
      strip.append(make("figure", {}, frame, make("figcaption", {}, time)));
    }
    box.append(strip);
  };
  // Room for the strip, so that nothing moves when it comes.
  box.style.minHeight = `${SHEET_ROOM[media.kind][1] + 22}px`;
  image.src = `media/${media.sheet}`;
  const settle = () => { box.style.minHeight = ""; };
  image.addEventListener("load", settle);
  image.addEventListener("error", settle);
  return box;
}

function drawParts(completion, tinted) {
  const box = make("div", { class: "spoken text", dir: "auto" });
  for (const [kind, content] of completion.parts) {
    const part = make("span", { class: `part ${kind}` });
    if (typeof content === "string") part.append(content);
    else {
      for (const [text, logProb] of content) {
        const tint = tinted ? tintOf(logProb) : null;
        const probability = logProb === null ? "unknown" : digits(Math.exp(logProb));
        const token = make("span", { title: `probability ${probability}` }, text);
        if (tint) token.style.backgroundColor = tint;
        part.append(token);
      }
    }
    box.append(part);
  }
  return box;
}

function drawLikelihood(group, completion) {
  const value = completion.likelihood;
  const line = make("div", { class: "likelihood" }, make("span", { class: "soft" }, "likelihood "),
    digits(value));
  if (value === null) return line;
  const fill = make("i");
  fill.style.width = `${100 * Math.min(1, value)}%`;
  const bar = make("div", { class: "bar" }, fill);
  if (group.meanLikelihood !== null) {
    const tick = make("b");
    tick.style.left = `calc(${100 * Math.min(1, group.meanLikelihood)}% - 1px)`;
    bar.append(tick);
    const of = group.meanOfRight ? "the right answers" : "all answers";
    bar.title = `the mean of ${of} is ${digits(group.meanLikelihood)}`;
    const difference = signed(value - group.meanLikelihood);
    line.append(make("span", { class: "soft" }, ` (${difference} to the mean)`));
  }
  line.append(bar);
  return line;
}

function drawNumbers(group, completion) {
  const list = make("dl");
  const add = (name, value) => list.append(make("dt", {}, name), make("dd", {}, value));
  add("reward", digits(completion.reward));
  for (const [name, value] of completion.rewards) add(name, digits(value));
  add("bonus", digits(completion.bonus));
  add("advantage", completion.advantage === null ? "–" : signed(completion.advantage));
  add("tokens", digits(completion.tokens));
  const badges = make("div", { class: "badges" }, make("span", { class: "soft" }, `#${completion.place}`),
    completion.answer === null ? null : make("strong", { class: "said", dir: "auto" }, completion.answer));
  if (completion.right !== null) {
    badges.append(completion.right ? badge("right", "good") : badge("wrong", "bad"));
  }
  if (completion.consistent !== null && completion.consistent !== undefined) {
    badges.append(completion.consistent ? badge("consistent", "good") : badge("inconsistent", "bad"));
  }
  if (completion.flags.includes("truncated")) badges.append(badge("truncated", "bad"));
  if (completion.flags.includes("unanswered")) badges.append(badge("no answer", "bad"));
  if (completion.unscored) badges.append(badge("answer not scored", "bad"));
  return make("div", { class: "numbers" }, badges, list, drawLikelihood(group, completion));
}

// Longer texts are folded; about what fits in the folded height.
const LONG = 900;

function drawCompletion(group, completion, tinted) {
  const spoken = drawParts(completion, tinted);
  const box = make("div", { class: "completion" }, drawNumbers(group, completion), spoken);
  const text = view.textOf(completion);
  if (text.length > LONG || text.split("\n").length > 10) {
    spoken.classList.add("long");
    const unfold = (event) => {
      event.target.textContent = spoken.classList.toggle("long") ? "Whole text" : "Less";
    };
    box.append(make("button", { class: "unfold", onclick: unfold }, "Whole text"));
  }
  return box;
}

function drawHeatMap(group) {
  const size = group.pairs.length;
  const numbers = [...Array(size).keys()];
  const head = make("tr", {}, make("th", {}, "answer \\ reasoning"),
    ...numbers.map((number) => make("th", { scope: "col" }, `#${number}`)));
  const rows = numbers.map((row) => make("tr", {}, make("th", { scope: "row" }, `#${row}`),
    ...numbers.map((column) => {
      const value = group.pairs[row][column];
      const title = `answer of #${row} after the reasoning of #${column}: ${digits(value)}`;
      const cell = make("td", { title, class: row === column ? "own" : null },
        value === null ? "–" : value.toFixed(2));
      const colour = heatOf(value);
      if (colour) cell.style.backgroundColor = colour;
      return cell;
    })));
  return make("details", { open: true }, make("summary", {}, "Likelihood of each answer after each reasoning"),
    make("div", { class: "wide" }, make("table", { class: "heat" }, head, ...rows)));
}

function drawQuestion(group) {
  const parts = [];
  if (group.question !== null) {
    parts.push(make("p", { class: "text question", dir: "auto" }, group.question));
  }
  if (group.options.length) {
    parts.push(make("ul", { class: "options" }, ...group.options.map(([letter, text, right]) => make(
      "li", { class: right ? "right" : null, dir: "auto" }, `${letter}. ${text}${right ? " ✓" : ""}`,
    ))));
  }
  if (group.solution !== null && !group.options.some(([, , right]) => right)) {
    parts.push(make("p", { class: "text" }, make("span", { class: "soft" }, "solution: "), group.solution));
  }
  return parts;
}

// The steps in which the same prompt was sampled, as a link to all of them.
function drawElsewhere(group, openPrompt) {
  const steps = view.runs[group.run].prompts.get(group.id);
  if (!steps) return null;
  return make("button", { class: "elsewhere", onclick: () => openPrompt(group.id) },
    `same prompt in ${steps.length} steps`);
}

// `matching`: the places of the completions to show at once.
function drawGroup(group, matching, { tinted, label, showStep, openPrompt }) {
  const right = group.completions.filter((one) => one.right).length;
  const heading = make("div", { class: "heading" }, label && make("span", { class: "soft" }, label),
    make("h2", {}, group.id),
    showStep ? make("span", { class: "soft" }, `step ${group.step}`) : null,
    group.noSignal ? badge("without signal", "bad", "all advantages are 0: nothing was learnt from it") : null,
    group.used === false ? badge("set aside", "", "dynamic sampling did not train on it") : null,
    drawElsewhere(group, openPrompt));
  const facts = [
    group.type, `${right} of ${group.completions.length} right`,
    `mean reward ${digits(group.meanReward)}`,
    group.meanLikelihood === null ? null
      : `mean likelihood of ${group.meanOfRight ? "right" : "all"} answers ${digits(group.meanLikelihood)}`,
    group.promptTokens === null ? null : `${group.promptTokens} prompt tokens`,
  ];
  const box = make("section", { class: "group" }, heading,
    make("p", { class: "facts" }, facts.filter(Boolean).join(" · ")),
    ...group.media.map(drawSheet), ...drawQuestion(group));
  matching.forEach((place) => box.append(drawCompletion(group, group.completions[place], tinted)));
  const rest = group.completions.map((_, place) => place).filter((place) => !matching.includes(place));
  if (rest.length) {
    const open = (event) => event.target.replaceWith(
      ...rest.map((place) => drawCompletion(group, group.completions[place], tinted)),
    );
    box.append(make("button", { class: "others", onclick: open }, `${rest.length} other completions`));
  }
  if (group.pairs) box.append(drawHeatMap(group));
  return box;
}
