"use strict";
// Numbers for people, and the page's colours.

const minus = (text) => text.replace("-", "\u2212");

// Nanoseconds, to three digits.
function span(ns) {
  const size = Math.abs(ns);
  const [unit, name] = size < 1e3 ? [1, "ns"] : size < 1e6 ? [1e3, "µs"] : size < 1e9 ? [1e6, "ms"] : [1e9, "s"];
  return minus(`${+(ns / unit).toPrecision(3)}${name}`);
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// An element with a class, text or children.
function make(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}
