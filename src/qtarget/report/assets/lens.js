// The lens page: everything shown is in QT.data.
(() => {
  const { data, el, number, table, lineChart, barChart } = QT;
  const SIGNS = { pass: "\u2713 pass", note: "\u2139 note", warn: "\u25b2 look", fault: "\u2717 fault", skip: "\u2013 not asked" };
  const at = (id) => document.getElementById(id);
  const status = (name) => el("span", { class: `lens-status lens-${name}` }, SIGNS[name]);
  const scroll = (node) => el("div", { class: "lens-scroll" }, node);
  const weight = (w) => w.name === null ? `${number(w.smallest)} .. ${number(w.largest)}` : w.name;
  const anchor = (i) => `loss-${i}`;

  /** Every second point of the sweep, so that each can be hovered. */
  function points(curves, name) {
    return curves.p_y.map((p, i) => [p, curves[name][i]]).filter((_, i) => i % 2 === 0);
  }

  function summary() {
    const rows = data.losses.map((loss, i) => [
      el("a", { href: `#${anchor(i)}` }, QT.visible(loss.name)),
      loss.form.fits ? "yes" : `no (misses by ${QT.percent(loss.form.largest_relative_error)})`,
      loss.form.fits ? weight(loss.form.a) : "\u2013",
      loss.form.fits ? weight(loss.form.b) : "\u2013",
      loss.form.fits && loss.form.q || "\u2013",
      loss.simplex.inside ? "yes" : `no (by ${number(loss.simplex.largest_negative_mass)})`,
      loss.scale.kind,
      ["fault", "warn"].map((kind) => [kind, loss.checks.filter((c) => c.status === kind).length]).filter((c) => c[1])
        .map(([kind, count]) => el("div", {}, status(kind), ` \u00d7 ${count}`)),
    ]);
    return scroll(table("Fits: the gradient is of the form above. Inside: Q is a distribution wherever looked.",
      ["loss", "fits", "a", "b", "q", "Q inside the simplex", "scale", "checks"], rows));
  }

  function compared() {
    const charts = [];
    if (data.losses.length > 1) for (let i = 0; i < data.losses.length; i += 4) {
      const some = data.losses.slice(i, i + 4);
      charts.push(lineChart({ title: `Update on the observed token: ${some.map((l) => l.name).join(", ")}`, ...P,
        y: "update of its logit", series: some.map((loss) => ({ name: loss.name, points: points(loss.curves, "observed") })),
        range: span(some.flatMap((l) => l.curves.observed)) }));
    }
    return el("div", { class: "lens-figures" }, charts);
  }

  const P = { x: "p_y, the model's probability of the observed token", xticks: [[0.002, "0"], [0.25, "0.25"], [0.5, "0.5"], [0.75, "0.75"], [0.99, "0.99"]] };

  /** A round range around the values, zero included. */
  function span(values) {
    const kept = values.filter((v) => v !== null);
    const low = Math.min(0, ...kept), high = Math.max(0, ...kept);
    if (high - low < 1e-9) return [-1, 1];
    const decade = 10 ** Math.floor(Math.log10((high - low) / 4));
    for (const step of [1, 2, 2.5, 5, 10, 20].map((m) => m * decade)) {  // four even steps whose ends are round numbers
      const first = Math.floor(low / step + 1e-9) * step;
      if (first + 4 * step >= high - 1e-9) return [first, first + 4 * step];
    }
    return [low, high];
  }

  function updates(loss) {
    const { curves } = loss;
    const names = [["observed", "observed token"], ["live_favourite", "model's favourite other token"]];
    if (loss.frozen) names.push(["frozen_favourite", "frozen model's favourite"]);
    return lineChart({ title: loss.titles.updates, ...P, y: "update of the logit (minus gradient)",
      series: names.map(([key, name]) => ({ name, points: points(curves, key) })), range: span(names.flatMap(([key]) => curves[key])),
      caption: "Up: the token becomes more likely." });
  }

  function weights(loss) {
    if (!loss.form.fits) return null;
    const names = loss.form.q ? ["a", "b"] : ["a"];
    return lineChart({ title: loss.titles.weights, ...P, y: "weight of the pull",
      series: names.map((name) => ({ name: name === "a" ? "a, towards the observed token" : `b, towards q: ${loss.form.q}`, points: points(loss.curves, name) })),
      range: span(names.flatMap((name) => loss.curves[name])) });
  }

  function situation(loss, one) {
    const series = [{ name: "p, the model", values: one.p }, { name: "Q, what is taught", values: one.target }];
    if (loss.frozen) series.push({ name: `${loss.frozen}, the frozen model`, values: one.frozen });
    return barChart({ title: `${one.name}: p_y = ${number(one.p_y)}, Q gives the observed token ${number(one.target[0])}`, x: "token", y: "probability",
      labels: ["observed", "model's favourite", "frozen's favourite", "all others"], series });
  }

  function section(loss, i) {
    const called = loss.called_with;
    const source = [loss.formula ? `${loss.formula}; ` : "", `${loss.source}; logits [${called.layout === "batch" ? "batch, time" : "tokens"}, vocab]`,
      called.shift ? `, labels shifted inside by ${called.shift}` : "", loss.frozen ? "; with a synthetic frozen model" : ""].join("");
    return el("section", { class: "lens-loss", id: anchor(i) }, el("h2", {}, QT.visible(loss.name)), el("p", { class: "qt-note" }, source),
      el("ul", {}, loss.verdict.map((sentence) => el("li", { class: sentence.startsWith("Fault") ? "lens-fault" : null }, sentence))),
      el("div", { class: "lens-figures" }, updates(loss), weights(loss), loss.situations.map((one) => situation(loss, one))),
      scroll(table("Checks on small batches with a known answer", ["check", "result", "finding"],
        loss.checks.map((check) => [check.name, status(check.status), check.finding]))));
  }

  at("lens-summary").append(summary());
  at("lens-compared").append(compared());
  at("lens-losses").append(...data.losses.map(section));
  at("lens-setting").append(el("h2", {}, "What was looked at"), el("dl", {}, Object.entries(data.setting).map(([key, value]) => [
    el("dt", {}, key), el("dd", {}, Array.isArray(value) ? value.join("; ") : String(value))]).flat()));
})();
