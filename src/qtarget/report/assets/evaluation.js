// The verdict: a table a set, differences between the trained models, and the rows on which they differ.
"use strict";
(() => {
  const { el, table, number, visible, data } = QT;
  const NONE = "\u2013", SHOWN = 50;
  const place = (id) => document.getElementById(id);
  const name = (text) => el("bdi", {}, visible(text));
  const span = (found, show) => found === null ? NONE : `${show(found.mean)} (${show(found.low)} .. ${show(found.high)})`;
  const percent = (share) => (100 * share).toFixed(1) + " %", plain = (value) => value.toFixed(3);
  const signed = (value, digits) => (value > 0 ? "+" : "") + value.toFixed(digits);
  const points = (share) => signed(100 * share, 1), change = (value) => signed(value, 3);
  const names = data.contenders.map((one) => one.name);

  function summary(set) {
    const about = data.sets[set];
    const head = ["model", "completed", "to the base, points", "cut off", "nll, nats a token", "to the base, nats"];
    const rows = data.contenders.map((one) => {
      const found = one.sets[set], to = found.to_base;
      return [name(one.base === null ? `${one.name} (base)` : one.name), span(found.completion, percent), to ? span(to.completion, points) : NONE,
        found.completion === null ? NONE : percent(found.completion.unfinished), span(found.nll, plain), to ? span(to.nll, change) : NONE];
    });
    const judged = about.metric ? `, judged by ${about.metric}` : ", not completed";
    return table(el("span", {}, `${set}: `, name(about.file), `, ${number(about.rows)} rows${judged}`), head, rows);
  }

  function notes() {
    const lines = data.contenders.flatMap((one) => one.notes.map((note) => `${one.name}: ${note}`));
    if (lines.length) place("notes").append(el("ul", {}, lines.map((line) => el("li", {}, visible(line)))));
  }

  function pairs() {
    const box = place("pairs");
    if (!data.pairs.length) { box.append(el("p", { class: "qt-note" }, "One trained model at most.")); return; }
    for (const set of Object.keys(data.sets)) {
      box.append(table(`${set}: the first minus the second`, ["", "completed, points", "nll, nats a token"], data.pairs.map((pair) =>
        [el("span", {}, name(pair.a), " \u2212 ", name(pair.b)), span(pair.sets[set].completion, points), span(pair.sets[set].nll, change)])));
    }
  }

  function answer(one) {
    const kind = one.score === 1 ? "qt-right" : one.score === 0 ? "qt-wrong" : "qt-part";
    return el("dd", { class: kind, dir: "auto", "data-score": percent(one.score) }, one.completion ? visible(one.completion) : el("em", {}, "(nothing)"));
  }

  function card(row) {
    return el("article", { class: "qt-case" }, el("span", { class: "qt-note" }, `row ${row.row + 1}`), el("dl", {},
      el("dt", {}, "prompt"), el("dd", { dir: "auto" }, visible(row.prompt)), el("dt", {}, "reference"), el("dd", { dir: "auto" }, visible(row.reference)),
      row.answers.map((one, i) => [el("dt", {}, name(names[i])), answer(one)]).flat()));
  }

  function rows() {
    const kept = Object.entries(data.rows).filter(([, found]) => found.shown.length);
    if (!kept.length) { place("rows").append(el("p", { class: "qt-note" }, "None.")); return; }
    const option = (text, value) => el("option", { value }, text);
    const set = el("select", { id: "set", change: draw }, kept.map(([key]) => option(key, key)));
    const better = el("select", { id: "better", change: draw }, option("any", ""), names.map((one, i) => option(one, i)));
    const worse = el("select", { id: "worse", change: draw }, option("any", ""), names.map((one, i) => option(one, i)));
    place("choice").append(el("label", {}, "set ", set), el("label", {}, "better ", better), el("label", {}, "than ", worse));
    function draw() {
      const found = data.rows[set.value];
      const ahead = (row) => {
        const scores = row.answers.map((one) => one.score);
        const low = worse.value === "" ? Math.min(...scores) : scores[worse.value], high = better.value === "" ? Math.max(...scores) : scores[better.value];
        return high > low;
      };
      const chosen = found.shown.filter(ahead);
      place("rows").replaceChildren(el("p", { class: "qt-note", id: "count" },
        `${chosen.length} of the ${found.shown.length} rows that are in this page; the models differ on ${number(found.differing)}.` + (chosen.length > SHOWN ? ` The first ${SHOWN} are shown.` : "")),
        ...chosen.slice(0, SHOWN).map(card));
    }
    draw();
  }

  function settings() {
    const lines = [...Object.entries(data.settings), ...data.contenders.flatMap((one) => Object.entries(one.max_new_tokens).map(([set, count]) => [`${one.name}: new tokens at most, ${set}`, count])),
      ...data.contenders.map((one) => [`${one.name} is`, one.model])];
    place("settings").append(table("Settings", ["", ""], lines.map(([key, value]) => [name(key), value === null ? NONE : name(String(value))])));
  }

  place("summary").append(...Object.keys(data.sets).map(summary));
  notes();
  pairs();
  rows();
  settings();
})();
