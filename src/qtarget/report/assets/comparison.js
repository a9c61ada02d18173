// The comparison: a table with the verdict's numbers, seeds, rates, curves, and the rows on which two models differ.
"use strict";
(() => {
  const { el, table, number, visible, lineChart, data } = QT;
  const NONE = "\u2013", SHOWN = 50, all = [data.base, ...data.contenders];
  const place = (id) => document.getElementById(id);
  const name = (text) => el("bdi", {}, visible(text));
  const isNll = (set) => data.sets[set].metric === "nll";
  const signed = (value, digits) => { const text = value.toFixed(digits); return Number(text) ? (value > 0 ? "+" : "") + text : text.replace("-", ""); };
  const level = (value, set) => value === null ? NONE : isNll(set) ? (-value).toFixed(3) : (100 * value).toFixed(1) + " %";
  /** A difference, larger is better inside; nll is shown with its own sign, so its ends change places. */
  const change = (found, set) => {
    if (!found) return NONE;
    const show = isNll(set) ? (v) => signed(-v, 3) : (v) => signed(100 * v, 1);
    const [low, high] = isNll(set) ? [found.high, found.low] : [found.low, found.high];
    return `${show(found.mean)} (${show(low)} .. ${show(high)})`;
  };
  const unit = (set) => isNll(set) ? "nats a token" : "points";
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

  function summary() {
    const about = data.sets.data, forgets = "forgetting" in data.sets;
    const head = ["contender", "learning rate", isNll("data") ? "nll, nats a token" : "answered right", `to ${data.baseline}, ${unit("data")}`, ...(isNll("data") ? [] : ["nll, nats a token"]),
      ...(forgets ? [`forgetting: level`, `to the base, ${unit("forgetting")}`] : []), "seconds a run", "memory, GB"];
    const rows = all.map((one) => [name(one.name), one.best_rate === null ? NONE : number(one.best_rate), level(one.level, "data"), change(one.to_baseline, "data"),
      ...(isNll("data") ? [] : [one.nll === null ? NONE : one.nll.toFixed(3)]),
      ...(forgets ? [level(one.forgetting.level, "forgetting"), change(one.forgetting.to_base, "forgetting")] : []),
      one.seconds.length ? mean(one.seconds).toFixed(1) : NONE, one.memory_bytes === null ? NONE : (one.memory_bytes / 1e9).toFixed(1)]);
    const left = about.not_judged ? `; ${number(about.not_judged)} more have no answer that it can judge` : "";
    const drawn = table(el("span", {}, name(about.file), `, ${number(about.rows)} rows by ${about.metric}${left}; ${data.certainty}`), head, rows);
    drawn.querySelectorAll("tbody tr").forEach((row, i) => { if (all[i].name === data.take) row.classList.add("qt-taken"); });
    place("summary").append(drawn);
    const lines = [...data.contenders.flatMap((one) => one.notes.map((note) => `${one.name}: ${note}`)), ...data.left_out.map((line) => `left out: ${line}`)];
    if (lines.length) place("notes").append(el("ul", {}, lines.map((line) => el("li", {}, visible(line)))));
  }

  function seeds() {
    const count = data.measure.seeds;
    place("seeds").append(table("The level of each seed, and their standard deviation without the rows' part", ["contender", ...Array.from({ length: count }, (_, i) => `seed ${i}`), "deviation"],
      data.contenders.map((one) => [name(one.name), ...one.by_seed.map((value) => level(value, "data")), isNll("data") ? one.seed_deviation.toFixed(3) : (100 * one.seed_deviation).toFixed(1)])));
  }

  function rates() {
    const tried = data.contenders.filter((one) => one.tuning.length);
    if (!tried.length) { place("rates").append(el("p", { class: "qt-note" }, "One rate for all; nothing was tuned.")); return; }
    place("rates").append(table("One seed that judges nothing. Rows of a half are judged at the rate that the other half chose", ["contender", "learning rate", "all rows", "half 0", "half 1", "chosen"],
      tried.flatMap((one) => one.tuning.map((line) => [name(one.name), number(line.rate), level(line.level, "data"), ...line.halves.map((value) => level(value, "data")),
        [line.rate === one.rates[1] ? "by half 0" : "", line.rate === one.rates[0] ? "by half 1" : "", line.rate === one.best_rate ? "by all" : ""].filter(Boolean).join(", ") || NONE]))));
  }

  function curves() {
    const series = (key) => data.contenders.map((one) => ({ name: one.name, points: one[key] })).filter((one) => one.points.length);
    const chart = (title, key) => series(key).length ? lineChart({ title, x: "step", y: "nats a token", series: series(key) }) : null;
    const drawn = [chart("Nll on validation rows", "validation"), chart("Nll on training rows", "curve")].filter(Boolean);
    place("curves").append(...(drawn.length ? drawn : [el("p", { class: "qt-note" }, "Nothing was logged.")]),
      el("p", { class: "qt-note" }, "Means over seeds, at the rate that is best on all rows. Nll favours targets that minimise it, and on noisy rows it pays to repeat their noise."));
  }

  function card(row) {
    const answers = row.answers.flatMap((one, i) => [el("dt", {}, name(data.rows.models[i])), answer(one)]);
    return el("article", { class: "qt-case" }, el("span", { class: "qt-note" }, `row ${row.row + 1}`), el("dl", {},
      el("dt", {}, "prompt"), el("dd", { dir: "auto" }, visible(row.prompt)), el("dt", {}, "reference"), el("dd", { dir: "auto" }, visible(row.reference)), answers));
  }
  function answer(one) {
    const kind = isNll("data") ? "" : one.score === 1 ? "qt-right" : one.score === 0 ? "qt-wrong" : "qt-part";
    const score = level(one.score, "data");
    const text = one.completion === null ? score : one.completion || el("em", {}, "(nothing)");
    return el("dd", { class: kind, dir: "auto", "data-score": score }, typeof text === "string" ? visible(text) : text);
  }
  function rows() {
    const found = data.rows;
    if (!found.shown.length) { place("rows").append(el("p", { class: "qt-note" }, "None.")); return; }
    const option = (text, value) => el("option", { value }, text);
    const better = el("select", { id: "better", change: draw }, option("any", ""), found.models.map((one, i) => option(one, i)));
    place("choice").append(el("label", {}, "better ", better));
    function draw() {
      const chosen = found.shown.filter((row) => better.value === "" || row.answers[better.value].score > row.answers[1 - better.value].score);
      place("rows").replaceChildren(el("p", { class: "qt-note", id: "count" }, `${chosen.length} of the ${found.shown.length} rows that are in this page; ${found.models.join(" and ")} differ on ${number(found.differing)}. ` +
        "Marks are means over seeds, answers the first seed's." + (chosen.length > SHOWN ? ` The first ${SHOWN} are shown.` : "")), ...chosen.slice(0, SHOWN).map(card));
    }
    draw();
  }

  function settings() {
    const lines = [...Object.entries(data.settings), ...Object.entries(data.cost),
      ...data.contenders.map((one) => [`${one.name} is`, JSON.stringify(one.overrides)])];
    place("settings").append(table("Settings and cost", ["", ""], lines.map(([key, value]) => [name(key), value === null ? NONE : name(String(value))])));
  }

  summary();
  seeds();
  rates();
  curves();
  rows();
  settings();
})();
