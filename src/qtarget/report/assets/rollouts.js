// Samples of a run, token by token: coloured by weight, advantage, pull, ratio or log-prob.
"use strict";
QT.completions = (box, runs) => {
  const { el, number, visible, colour } = QT;
  const kept = runs.filter((run) => run.completions && run.completions.length);
  if (!kept.length) { box.append(el("p", { class: "qt-note" }, "No samples were kept (a run of `qtarget rl` keeps some; kept_samples).")); return; }
  const ratio = (row, t) => (row.anchor[t] === null || row.log_probs[t] === null ? null : Math.exp(row.log_probs[t] - row.anchor[t]));
  const pull = (row, t, w) => (w === null || row.advantages[t] === null || ratio(row, t) === null ? null : w * ratio(row, t) * row.advantages[t]);
  const MEASURES = { "weight w": (row, t, w) => w, "advantage A": (row, t) => row.advantages[t], "pull w r A": pull,
    "ratio r": ratio, "log-prob, nats": (row, t) => row.log_probs[t], "loss of the token": (row, t) => row.losses[t] };

  const select = (label, values, name) => {
    const node = el("select", { id: `completions-${name}`, change: () => draw(name) }, values.map((value) => el("option", {}, value)));
    return [el("label", {}, `${label} `, node, " "), node];
  };
  const [runLabel, run] = select("run", kept.map((one) => one.name), "run");
  const [regionLabel, region] = select("region", Object.keys(kept[0].completions[0].regions), "region");
  const [colourLabel, measure] = select("colour", Object.keys(MEASURES), "colour");
  const [orderLabel, order] = select("order", ["as drawn", "reward, highest first", "reward, lowest first"], "order");
  const holder = el("div", {});
  const total = (row) => Object.values(row.rewards || {}).reduce((sum, value) => sum + (value || 0), 0);

  function token(row, t, value, w, low, high) {
    if (row.log_probs[t] === null) return el("span", { class: "qt-token masked" }, visible(row.tokens[t]));
    const lines = [`advantage ${number(row.advantages[t])}, ratio ${number(ratio(row, t))}, weight ${number(w)}, pull ${number(pull(row, t, w))}`,
      `log-prob ${number(row.log_probs[t])} nats, when sampled ${number(row.anchor[t])}; loss ${number(row.losses[t])}`];
    const tell = (event) => QT.showTip(event.currentTarget, lines.map((line) => el("div", {}, line)));
    const span = el("span", { class: `qt-token${w === 0 ? " blocked" : ""}`, tabindex: 0, mouseenter: tell, focus: tell, mouseleave: QT.hideTip, blur: QT.hideTip }, visible(row.tokens[t]));
    if (value === null) return span;
    const shade = colour(high > low ? (value - low) / (high - low) : 0.5);
    span.style.background = shade.ground;
    span.style.color = shade.ink;
    return span;
  }

  function draw() {
    const one = kept[run.selectedIndex], values = MEASURES[measure.value];
    const rows = [...one.completions];
    if (order.selectedIndex) rows.sort((a, b) => (order.selectedIndex === 1 ? total(b) - total(a) : total(a) - total(b)));
    const weights = (row) => row.regions[region.value] || row.weights;
    const all = rows.flatMap((row) => row.tokens.map((_, t) => values(row, t, weights(row)[t]))).filter((v) => v !== null && v !== undefined);
    const low = Math.min(...all, 0), high = Math.max(...all, measure.value === "weight w" ? 1 : 0);
    const scale = el("span", { class: "qt-scale" });
    scale.style.background = `linear-gradient(90deg, ${Array.from({ length: 21 }, (_, i) => colour(i / 20).ground).join(",")})`;
    holder.replaceChildren(
      el("p", { class: "qt-note" }, `${number(low)} `, scale, ` ${number(high)}: ${measure.value}. Struck through: blocked. Grey: not trained on. Numbers on hover or focus. ${rows.length} samples.`),
      ...rows.map((row) => el("div", { class: "qt-sample", dir: "ltr" },
        el("div", { class: "qt-note" }, `step ${row.step}${row.age ? `, ${row.age} steps old` : ""}`,
          Object.entries(row.rewards || {}).flatMap(([name, value]) => [", ", el("bdi", {}, visible(name)), ` ${number(value)}`]),
          row.rewards ? `, advantage ${number(row.advantages.find((a) => a !== null) ?? null)}` : ""),
        el("div", { class: "qt-prompt" }, visible(row.prompt.slice(-1000))),
        el("div", { class: "qt-row" }, row.tokens.map((_, t) => {
          const w = weights(row)[t];
          return token(row, t, values(row, t, w) ?? null, w, low, high);
        })))));
  }
  box.append(el("p", {}, runLabel, regionLabel, colourLabel, orderLabel), holder);
  draw();
  QT.onTheme(draw);
};
