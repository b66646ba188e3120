// Small parts of a page. Text only ever gets in as text: nothing here parses HTML.
"use strict";

// An element with attributes and children; a child may be a text, and null is left out.
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// A number as a person reads it: three digits, and a dash for none.
function digits(value) {
  if (value === null || value === undefined) return "–";
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

function signed(value) {
  return value > 0 ? `+${digits(value)}` : digits(value);
}

function badge(text, kind, title = null) {
  return make("span", { class: `badge ${kind}`, title }, text);
}

// How unlikely a token was: from none at probability 1 to strong at 1 in 150 and less.
function tintOf(logProb) {
  if (logProb === null) return null;
  const strength = Math.min(1, -logProb / 5);
  return strength < 0.02 ? null : `rgba(213, 94, 0, ${(0.65 * strength).toFixed(2)})`;
}

// A likelihood in the heat map: blue, the stronger the likelier.
function heatOf(value) {
  return value === null ? null : `rgba(0, 114, 178, ${(0.08 + 0.72 * Math.min(1, value)).toFixed(2)})`;
}
