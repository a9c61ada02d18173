// Shared by all report pages: data, packed columns, safe text, colours, tabs, tooltips and small SVG charts.
// Text of the data reaches the page through text nodes alone; there is no innerHTML anywhere.
"use strict";
const QT = (() => {
  const data = JSON.parse(document.getElementById("qt-data").textContent);
  const root = document.documentElement;

  // -- elements ---------------------------------------------------------------------------------------------------
  /** An element: attributes (`class`, `title`, ...; functions become listeners), then children (text or nodes). */
  function el(name, attributes = {}, ...children) {
    const node = name.startsWith("svg:")
      ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (typeof value === "function") node.addEventListener(key, value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  }

  function problem(message) {
    const box = document.getElementById("qt-problem");
    box.textContent = message;
    box.hidden = false;
  }

  // -- packed columns -----------------------------------------------------------------------------------------------
  const ARRAYS = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int8: Int8Array, int16: Int16Array,
    int32: Int32Array, float32: Float32Array };

  /** A typed array from what `pack_column` wrote. */
  async function unpack(column) {
    if (typeof DecompressionStream === "undefined") throw new Error("this browser has no DecompressionStream; use one of 2023 or later");
    const text = atob(column.data);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    // typed arrays have the machine's order of bytes, which is little-endian wherever browsers run
    return new ARRAYS[column.dtype](await new Response(stream).arrayBuffer());
  }

  // -- text of the data -----------------------------------------------------------------------------------------------
  // Controls, zero-width and bidirectional marks, byte-order mark, tag characters, lone surrogates, private use.
  const HIDDEN = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\p{Cs}\p{Co}\u{e0000}-\u{e0fff}]/u;
  const NAMES = { 0x9: "TAB", 0xd: "CR", 0x200b: "ZERO WIDTH SPACE", 0x200c: "ZERO WIDTH NON-JOINER", 0x200d: "ZERO WIDTH JOINER",
    0x200e: "LEFT-TO-RIGHT MARK", 0x200f: "RIGHT-TO-LEFT MARK", 0x202a: "LEFT-TO-RIGHT EMBEDDING", 0x202b: "RIGHT-TO-LEFT EMBEDDING",
    0x202c: "POP DIRECTIONAL FORMATTING", 0x202d: "LEFT-TO-RIGHT OVERRIDE", 0x202e: "RIGHT-TO-LEFT OVERRIDE", 0x2066: "LEFT-TO-RIGHT ISOLATE",
    0x2067: "RIGHT-TO-LEFT ISOLATE", 0x2068: "FIRST STRONG ISOLATE", 0x2069: "POP DIRECTIONAL ISOLATE", 0xfeff: "ZERO WIDTH NO-BREAK SPACE" };

  // Marks above and below a letter: more than any script stacks would be drawn over the lines around.
  const MARK = /\p{M}/u, STACK = 4, STACKED = new RegExp(`\\p{M}{${STACK + 1}}`, "u");

  /** Nodes that show a text as it is, with characters that hide, reorder or cover text spelled out. */
  function visible(text) {
    if (!HIDDEN.test(text) && !text.includes("\n") && !STACKED.test(text)) return [text];
    const nodes = [];
    let plain = "", stack = 0;
    for (const character of text) {
      stack = MARK.test(character) ? stack + 1 : 0;
      const shown = character === "\n" ? "\u21b5" : stack > STACK || HIDDEN.test(character) ? controlName(character) : null;
      if (shown === null) { plain += character; continue; }
      if (plain) nodes.push(plain);
      plain = "";
      const code = character.codePointAt(0);
      nodes.push(el("span", { class: character === "\n" ? "qt-newline" : "qt-control", title: NAMES[code] || (code === 10 ? "line feed" : stack ? "one of many marks on a letter" : "invisible character") }, shown));
      if (character === "\n") nodes.push("\n");
    }
    if (plain) nodes.push(plain);
    return nodes;
  }

  function controlName(character) {
    const code = character.codePointAt(0);
    return code === 9 ? "\u21e5" : "U+" + code.toString(16).toUpperCase().padStart(4, "0");
  }

  /** A number for people: three or four significant digits. */
  function number(value) {
    if (value === null || value === undefined) return "\u2013";
    if (value === 0 || Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en-US");
    return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
  }
  const percent = (share) => share === null || share === undefined ? "\u2013" : number(100 * share) + " %";

  // -- colours ------------------------------------------------------------------------------------------------------
  // Cividis (Nunez, Anderton, Renslow 2018), sampled: made to read alike with and without colour-vision deficiency.
  const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];
  const dark = () => root.dataset.theme === "dark";

  /** Colour of a share in [0, 1]: large values stand out from the ground, in light and in dark. */
  function colour(share) {
    const place = (dark() ? share : 1 - share) * (CIVIDIS.length - 1);
    const low = Math.min(CIVIDIS.length - 2, Math.floor(place));
    const rgb = CIVIDIS[low].map((value, i) => Math.round(value + (place - low) * (CIVIDIS[low + 1][i] - value)));
    // at 0.18 black and white ink have the same contrast
    const luminance = (0.2126 * rgb[0] ** 2.2 + 0.7152 * rgb[1] ** 2.2 + 0.0722 * rgb[2] ** 2.2) / 255 ** 2.2;
    return { ground: `rgb(${rgb.join(",")})`, ink: luminance > 0.18 ? "#000" : "#fff" };
  }

  const themeListeners = [];
  function setTheme(name) {
    root.dataset.theme = name;
    for (const listener of themeListeners) listener(name);
  }
  setTheme(new URLSearchParams(location.search).get("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  document.getElementById("qt-theme").addEventListener("click", () => setTheme(dark() ? "light" : "dark"));

  // -- tabs and tooltip ----------------------------------------------------------------------------------------------
  /** Tabs over sections of the page: `[[id of the section, label], ...]`; calls `opened(id)` at each first opening. */
  function tabs(holder, sections, opened = () => {}) {
    const seen = new Set();
    const buttons = sections.map(([id, label]) => el("button", { type: "button", role: "tab", id: `tab-${id}`, "aria-controls": id, click: () => show(id),
      keydown: (event) => move(event, id) }, label));
    holder.setAttribute("role", "tablist");
    holder.classList.add("qt-tabs");
    holder.append(...buttons);
    function show(id) {
      sections.forEach(([other], i) => {
        document.getElementById(other).hidden = other !== id;
        buttons[i].setAttribute("aria-selected", String(other === id));
        buttons[i].tabIndex = other === id ? 0 : -1;
      });
      if (!seen.has(id)) { seen.add(id); opened(id); }
    }
    function move(event, id) {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = (sections.findIndex(([other]) => other === id) + step + sections.length) % sections.length;
      show(sections[next][0]);
      buttons[next].focus();
    }
    sections.forEach(([id]) => { const part = document.getElementById(id); part.setAttribute("role", "tabpanel"); part.setAttribute("aria-labelledby", `tab-${id}`); });
    show(sections[0][0]);
    return show;
  }

  const tip = document.getElementById("qt-tip");
  /** Show nodes beside an element. */
  function showTip(anchor, ...children) {
    tip.replaceChildren(...children.flat());
    tip.hidden = false;
    const at = anchor.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const below = at.bottom + 6 + size.height <= innerHeight || at.top < size.height + 6;
    tip.style.left = Math.max(4, Math.min(at.left, innerWidth - size.width - 4)) + "px";
    tip.style.top = Math.max(4, below ? Math.min(at.bottom + 6, innerHeight - size.height - 4) : at.top - size.height - 6) + "px";
  }
  function hideTip() { tip.hidden = true; }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

  // -- tables and charts ---------------------------------------------------------------------------------------------
  /** A table; cells are text, numbers or nodes. */
  function table(caption, head, rows) {
    return el("div", { class: "qt-wide" }, el("table", { class: "qt" }, el("caption", {}, caption),
      el("thead", {}, el("tr", {}, head.map((cell) => el("th", { scope: "col" }, cell)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => el(i ? "td" : "th", i ? {} : { scope: "row" }, typeof cell === "number" || cell === null ? number(cell) : cell)))))));
  }

  const SERIES = ["one", "two", "three", "four", "five", "six", "seven", "eight"].map((name) => `var(--${name})`);
  const DASHES = ["", "6 3", "2 3", "8 3 2 3", "", "6 3", "2 3", "8 3 2 3"];
  const W = 620, H = 240, LEFT = 84, BOTTOM = 44, TOP = 12, RIGHT = 28;

  /** About five round numbers, 1, 2 or 5 times a power of ten apart, from at or below `low` to at or above `high`. */
  function roundTicks(low, high) {
    const rough = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(0.7 * rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= 0.7 * rough) * power;
    const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
    return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(9)));
  }
  /** Axes: `x` as it is, `y` widened to round numbers. */
  function frame(x, y, labels) {
    const marks = roundTicks(...y);
    y = [marks[0], marks.at(-1)];
    const svg = el("svg:svg", { viewBox: `0 0 ${W} ${H}`, width: W, role: "img", "aria-label": labels.title });
    const sx = (v) => LEFT + (v - x[0]) / (x[1] - x[0] || 1) * (W - LEFT - RIGHT);
    const sy = (v) => H - BOTTOM - (v - y[0]) / (y[1] - y[0] || 1) * (H - BOTTOM - TOP);
    for (const value of marks) {
      svg.append(el("svg:line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: sy(value), y2: sy(value) }),
        el("svg:text", { x: LEFT - 6, y: sy(value) + 4, "text-anchor": "end" }, number(value)));
    }
    svg.append(el("svg:text", { x: (LEFT + W - RIGHT) / 2, y: H - 6, "text-anchor": "middle" }, labels.x),
      el("svg:text", { x: 14, y: (H - BOTTOM + TOP) / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${(H - BOTTOM + TOP) / 2})` }, labels.y));
    return { svg, sx, sy };
  }
  function ticks(svg, sx, marks) {
    for (const [value, label] of marks) svg.append(el("svg:text", { x: sx(value), y: H - BOTTOM + 16, "text-anchor": "middle" }, label));
  }
  function legend(names) {
    return el("p", { class: "qt-note" }, names.map((name, i) => [el("svg:svg", { width: 34, height: 10 }, el("svg:line", { x1: 2, x2: 30, y1: 5, y2: 5,
      "stroke-width": 3, "stroke-dasharray": DASHES[i % 8] || null, style: `stroke:${SERIES[i % 8]}` })), name + "\u2003"]).flat());
  }
  /** Lines: `series` is `[{name, points: [[x, y], ...]}, ...]`; points with y null are left out; numbers on hover. */
  function lineChart({ title, x, y, series, caption = "", range = null, xticks = null }) {
    const points = series.flatMap((s) => s.points.filter((p) => p[1] !== null));
    if (!points.length) return el("p", { class: "qt-note" }, `${title}: no values.`);
    const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
    const spanX = [Math.min(...xs), Math.max(...xs)], spanY = range || [Math.min(0, ...ys), Math.max(...ys) || 1];
    const { svg, sx, sy } = frame(spanX, spanY, { title, x, y });
    ticks(svg, sx, xticks || roundTicks(...spanX).filter((v) => v >= spanX[0] && v <= spanX[1]).map((v) => [v, number(v)]));
    series.forEach((s, i) => {
      const kept = s.points.filter((p) => p[1] !== null);
      svg.append(el("svg:polyline", { points: kept.map((p) => `${sx(p[0])},${sy(p[1])}`).join(" "), fill: "none", "stroke-width": 2,
        "stroke-dasharray": DASHES[i % 8] || null, style: `stroke:${SERIES[i % 8]}` }));
      if (kept.length <= 64) for (const p of kept) svg.append(el("svg:circle", { cx: sx(p[0]), cy: sy(p[1]), r: 4, style: `fill:${SERIES[i % 8]}` },
        el("svg:title", {}, `${s.name}: ${x} ${p[2] || number(p[0])}, ${y} ${number(p[1])}`)));
    });
    return el("figure", { class: "qt-figure" }, el("strong", {}, title), svg, series.length > 1 ? legend(series.map((s) => s.name)) : null, el("figcaption", {}, caption));
  }
  /** Grouped bars: `labels` along x, `series` is `[{name, values}, ...]`; numbers on hover. */
  function barChart({ title, x, y, labels, series, caption = "" }) {
    const all = series.flatMap((s) => s.values).filter((v) => v !== null);
    const { svg, sx, sy } = frame([0, labels.length], [Math.min(0, ...all), Math.max(...all, 1e-12)], { title, x, y });
    const widest = 7 * Math.max(...labels.map((label) => label.length)) + 8;
    const step = Math.ceil(labels.length * widest / (W - LEFT - RIGHT)), width = (sx(1) - sx(0)) * 0.86 / series.length;
    ticks(svg, sx, labels.map((label, i) => [i + 0.5, label]).filter((_, i) => i % step === 0));
    series.forEach((s, j) => s.values.forEach((value, i) => {
      if (value === null) return;
      const top = Math.min(sy(value), sy(0));
      svg.append(el("svg:rect", { x: sx(i) + (sx(1) - sx(0)) * 0.07 + j * width, y: top, width: Math.max(1, width - 1), height: Math.max(0.5, Math.abs(sy(value) - sy(0))),
        style: `fill:${SERIES[j % 8]}` }, el("svg:title", {}, `${s.name}, ${labels[i]}: ${number(value)}`)));
    }));
    return el("figure", { class: "qt-figure" }, el("strong", {}, title), svg, series.length > 1 ? legend(series.map((s) => s.name)) : null, el("figcaption", {}, caption));
  }

  addEventListener("error", (event) => problem(`The page met an error: ${event.message}`));
  addEventListener("unhandledrejection", (event) => problem(`The page met an error: ${event.reason && event.reason.message || event.reason}`));
  return { data, el, unpack, visible, number, percent, colour, dark, onTheme: (f) => themeListeners.push(f), setTheme, tabs, showTip, hideTip, table, lineChart, barChart, problem };
})();
