// The verdict on rows: counts, the histogram with both components, and the rows at the border.
"use strict";
(() => {
  const { el, table, number, visible, lineChart, data } = QT;
  const place = (id) => document.getElementById(id);
  const name = (text) => el("bdi", {}, visible(text));
  const NOTHING = "\u2013";
  const FACTS = {
    gain: "held-out likelihood, two kinds over one, nats", gain_error: "its standard error", good_mode: "most rows score, nats", bad_mean: "the other kind scores on average, nats",
    share: "its share of the rows", bad_rows: "rows that are likelier bad than good", kept_excess: "surprise of the other rows beyond what the base expects, nats a token",
    told_by_prompt: "ROC of the prompts alone (0.5: they say nothing)",
  };

  function totals() {
    if (data.as === "weight" && !data.weights) return [["kept, none weighed", number(data.kept)]];
    if (!data.weights) return [["kept", number(data.kept)], ["dropped", number(data.dropped)]];
    return [["kept, each weighed by P(right)", number(data.kept)], ["their weights in all", data.weights.sum.toFixed(1)],
      ["of a weight under 0.05", number(data.weights.light)], ["with a weight of their own before, which is multiplied", number(data.weights.own)]];
  }

  function counts() {
    place("counts").append(table(el("span", {}, name(data.data), ", judged by ", name(data.rule), " from ", name(data.cache)), ["", "rows"],
      [...totals(), ["not judged, they train on nothing", number(data.not_judged)]]));
    if (data.weights) data.weights.lines.forEach((line) => place("counts").append(el("p", { class: "qt-note" }, name(line))));
    if (!data.groups) return;
    const heads = data.weights ? ["weights", "under 0.05"] : ["dropped", "share"];
    const cells = data.weights ? (line) => [line.weight.toFixed(1), number(line.light)]
      : (line) => [number(line.dropped), (100 * line.dropped / line.rows).toFixed(1) + " %"];
    place("counts").append(table(el("span", {}, "by ", name(data.groups.column)), ["", "rows", ...heads],
      data.groups.rows.map((line) => [name(line.value), number(line.rows), ...cells(line)])));
  }

  function histogram() {
    const found = data.histogram;
    if (!found) { place("histogram").append(el("p", { class: "qt-note" }, "Nothing was scored.")); return; }
    // most rows stand in a few bins, and a few bad rows in many
    const line = (title, values) => ({ name: title, points: values.map((value, i) => [found.middles[i], Math.log10(1 + value)]) });
    const series = [line("rows", found.rows)];
    if (found.good) series.push(line("good, as fitted", found.good), line("bad, as fitted", found.bad));
    const caption = data.threshold === null ? "No row is dropped." : `Rows above ${data.threshold.toFixed(2)} are ${data.as === "weight" ? "likelier bad than right" : "dropped"}.`;
    place("histogram").append(lineChart({ title: `Rows by ${data.rule}`, x: data.witnesses[data.rule] || data.rule, y: "log10 (1 + rows)", series, caption }));
  }

  function facts() {
    const lines = Object.entries(data.facts).map(([key, value]) => [FACTS[key] || key, typeof value === "number" ? number(value) : String(value)]);
    if (lines.length) place("facts").append(table("What the verdict rests on", ["", ""], lines));
    if (data.roc) place("roc").append(table(`Against the marks of ${number(data.roc.marked)} rows`, ["score", "ROC-AUC"],
      Object.entries(data.roc.auc).map(([key, value]) => [name(key), value === null ? NOTHING : value.toFixed(3)])));
    if (data.roc && data.roc.curve) place("roc").append(lineChart({ title: `Marked rows found by ${data.rule}`, x: "share of the other rows above", y: "share of the marked rows above",
      series: [{ name: data.rule, points: data.roc.curve }], range: [0, 1] }));
  }

  function card(row) {
    const scores = Object.entries(row.scores).map(([key, value]) => `${key} ${value.toFixed(2)}`).join(", ");
    return el("article", { class: row.kept ? "qt-case" : "qt-case qt-dropped" },
      el("span", { class: "qt-note" }, `row ${row.row + 1}: ${row.reason}`), row.marked ? el("span", { class: "qt-marked" }, " marked as noise") : null,
      el("dl", {}, el("dt", {}, "prompt"), el("dd", { dir: "auto" }, visible(row.prompt)), el("dt", {}, "answer"), el("dd", { dir: "auto" }, visible(row.answer)),
        el("dt", {}, "scores"), el("dd", {}, scores)));
  }

  function rows() {
    const kinds = Object.entries(data.borders).filter(([, found]) => found.length);
    if (!kinds.length) { place("rows").append(el("p", { class: "qt-note" }, "None.")); return; }
    const kind = el("select", { id: "kind", change: draw }, kinds.map(([key, found]) => el("option", { value: key }, `${key} (${found.length})`)));
    place("choice").append(el("label", {}, "show ", kind));
    function draw() { place("rows").replaceChildren(...data.borders[kind.value].map(card)); }
    draw();
  }

  counts();
  histogram();
  facts();
  rows();
})();
