// The comparison of runs: a summary, and the tokens of the sample rows coloured by what training changed.
"use strict";
(() => {
  const { el, table, number, visible, colour, data } = QT;
  const place = (id) => document.getElementById(id);

  // a run of samples has rewards and often no nll; one that has neither stands in the first table
  function measured(key, metric, best, caption, shown) {
    const at = (point) => (point ? `${number(point[metric])} (step ${point.step})` : "\u2013");
    const rows = data.runs.filter(shown).flatMap((run) => {
      const sets = Object.entries(run[key]);
      const state = run.status.state + (run.status.max_steps ? `, ${run.status.step} of ${run.status.max_steps} steps` : `, step ${run.status.step}`);
      const line = (name, found) => [el("bdi", {}, visible(run.name)), run.target || "\u2013", state, name, at(found.first), at(found.last), at(found[best])];
      return sets.length ? sets.map(([name, found]) => line(name, found)) : [line("\u2013", {})];
    });
    if (rows.length) place("summary").append(table(caption, ["run", "target", "state", "rows", "first", "last", best], rows));
  }

  function summary() {
    const some = (value) => Object.keys(value).length > 0;
    measured("clean_nll", "nll", "lowest", "Plain nll on evaluation rows, nats a token", (run) => some(run.clean_nll) || !some(run.rewards));
    measured("rewards", "reward", "highest", "Reward of samples; of other rows where they were evaluated", (run) => some(run.rewards));
    const notes = data.runs.flatMap((run) => [...run.notes, ...(run.status.reason ? [run.status.reason] : [])].map((note) => `${run.name}: ${note}`));
    if (notes.length) place("notes").append(el("ul", {}, notes.map((note) => el("li", {}, visible(note)))));
  }

  function differences() {
    const box = place("differences");
    if (data.runs.length < 2) { box.append(el("p", { class: "qt-note" }, "One run.")); return; }
    if (!data.differences.length) { box.append(el("p", { class: "qt-note" }, "Nothing that was recorded.")); return; }
    box.append(table("Settings, data and versions that are not the same in all", ["", ...data.runs.map((run) => run.name)],
      data.differences.map((one) => [one.key, ...one.values.map((value) => (value === null ? "\u2013" : el("span", {}, visible(value.slice(0, 200)))))])));
  }

  function paint(holder, change) {
    const most = Math.max(1e-9, ...change.rows.flatMap((row) => row.before.map((before, t) => (before === null || row.after[t] === null ? 0 : Math.abs(row.after[t] - before)))));
    const share = (value) => (value / most + 1) / 2;
    const steps = Array.from({ length: 21 }, (_, i) => colour(i / 20).ground);
    const scale = el("span", { class: "qt-scale" });
    scale.style.background = `linear-gradient(90deg, ${steps.join(",")})`;
    const rows = change.rows.map((row) => el("div", { class: "qt-row", dir: "ltr" }, el("span", { class: "qt-note" }, `row ${row.row + 1} `),
      row.tokens.map((token, t) => tokenSpan(row, token, t, share))));
    const list = (name, items) => table(name, ["context", "token", "row", "before", "after", "change"],
      items.map((one) => [el("bdi", {}, visible(one.context.slice(-60))), el("bdi", {}, visible(one.token)), String(one.row), one.before, one.after, one.change]));
    holder.replaceChildren(
      el("p", {}, `Nll ${number(change.nll_before)} at step ${change.from_step}, ${number(change.nll_after)} at step ${change.to_step}, over ${change.token_count.toLocaleString("en-US")} tokens of ${change.row_count} rows (${change.source}).`),
      el("p", { class: "qt-note" }, `${number(-most)} `, scale, ` ${number(most)}: change of the token's log-prob, nats. Plain: not trained on. Numbers on hover or focus.`),
      ...rows, el("div", { id: "extremes" }, list("Largest gains, nats", change.gains), list("Largest losses, nats", change.losses)));
  }

  function tokenSpan(row, token, t, share) {
    const before = row.before[t], after = row.after[t];
    if (before === null || after === null) return el("span", { class: "qt-token masked" }, visible(token));
    const lines = [`log-prob ${number(before)} to ${number(after)}, change ${number(after - before)} nats`];
    if (row.weight_after[t] !== null && row.weight_before[t] !== null) lines.push(`label weight ${number(row.weight_before[t])} to ${number(row.weight_after[t])}`);
    const tell = (event) => QT.showTip(event.currentTarget, lines.map((line) => el("div", {}, line)));
    const shade = colour(share(after - before));
    const span = el("span", { class: "qt-token", tabindex: 0, mouseenter: tell, focus: tell, mouseleave: QT.hideTip, blur: QT.hideTip }, visible(token));
    span.style.background = shade.ground;
    span.style.color = shade.ink;
    return span;
  }

  function tokens() {
    const box = place("tokens");
    if (!data.tokens.length) {
      box.append(el("p", { class: "qt-note" }, "No two evaluations with token samples (heatmap_rows); checkpoints can be scored with --rows FILE."));
      return;
    }
    const holder = el("div", { id: "change" });
    const choice = el("select", { id: "which", change: () => paint(holder, data.tokens[Number(choice.value)]) },
      data.tokens.map((change, i) => el("option", { value: i }, `${change.run}: ${change.rows_of}, step ${change.from_step} to ${change.to_step}`)));
    box.append(el("label", {}, "run ", choice), holder);
    const draw = () => paint(holder, data.tokens[Number(choice.value)]);
    draw();
    QT.onTheme(draw);
  }

  summary();
  QT.completions(place("completions"), data.runs);
  tokens();
  differences();
})();
