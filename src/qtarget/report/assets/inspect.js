// The page of `qtarget inspect`: rows of coloured tokens, rendered when they come near the window, and the charts.
"use strict";
(async () => {
  const { data, el, number, percent } = QT;
  const $ = (id) => document.getElementById(id);
  const state = { view: 0, target: 0, quantity: "surprise", sort: "surprising" };

  // -- columns --------------------------------------------------------------------------------------------------------
  const rows = data.tokens.rows;                      // page row -> row of the overview
  const offsets = [0], trainedOffsets = [0];
  for (const i of rows) { offsets.push(offsets.at(-1) + data.row_tokens[i]); trainedOffsets.push(trainedOffsets.at(-1) + data.row_trained[i]); }
  const total = offsets.at(-1);

  async function fromPlanes(planes) {
    const bytes = await Promise.all(planes.map(QT.unpack));
    if (bytes.length === 1) return bytes[0];
    const out = new Uint32Array(bytes[0].length);
    for (let i = 0; i < out.length; i++) for (let k = 0; k < bytes.length; k++) out[i] |= bytes[k][i] << (8 * k);
    return out;
  }
  /** `at(i)`: the number of a coded column, or null. */
  async function coded(column) {
    if (!column) return null;
    const codes = await QT.unpack(column.codes), values = column.values;
    const at = (i) => codes[i] === 255 ? null : values[codes[i]];
    at.codes = codes;
    at.values = values;
    return at;
  }
  const [ids, changes, [textBytes, vocabularyIds], marks] = await Promise.all([fromPlanes(data.tokens.ids), QT.unpack(data.tokens.mask_changes),
    Promise.all(data.texts.map(QT.unpack)), data.tokens.marks ? QT.unpack(data.tokens.marks) : null]);
  const texts = JSON.parse(new TextDecoder().decode(textBytes));
  const trained = new Uint8Array(total);
  for (let k = 0; k < changes.length; k += 2) trained.fill(1, changes[k], k + 1 < changes.length ? changes[k + 1] : total);

  const views = data.views.map(() => null);
  async function loadView(v) {
    if (views[v]) return;
    const packed = data.tokens.views[v];
    const [logProbs, entropy, crossfit, ranks, weights, moved] = await Promise.all([coded(packed.log_probs), coded(packed.entropy), coded(packed.crossfit), QT.unpack(packed.ranks),
      Promise.all(packed.weights.map(coded)), Promise.all(packed.moved.map(coded))]);
    views[v] = { logProbs, entropy, crossfit, ranks, weights, moved, alternatives: null };
  }
  const detailed = new Map();                         // row of the overview -> first trained token among the detailed
  { let at = 0; for (const i of data.alternatives.rows) { detailed.set(i, at); at += data.row_trained[i]; } }
  async function loadAlternatives(v) {
    const packed = data.alternatives.views[v];
    if (!packed || views[v].alternatives) return;
    const [alternativeIds, probs, q] = await Promise.all([fromPlanes(packed.ids), coded(packed.probs), Promise.all(packed.q.map(coded))]);
    views[v].alternatives = { ids: alternativeIds, probs, q, slots: packed.probs.codes.shape[1] };
  }

  const weightOf = (t, j, v = state.view) => views[v].weights[t](j);
  function movedOf(t, j, v = state.view) {
    const stored = views[v].moved[t];
    // not stored where it is |a| (1 - p), see `simple` in page.py; expm1 keeps 1 - p exact for p near 1
    return stored ? stored(j) : Math.abs(weightOf(t, j, v)) * -Math.expm1(views[v].logProbs(j));
  }
  const movedMean = (t) => data.views[state.view].summary[t].moved_mean || 1;
  const topK = () => data.views[state.view].top_k;

  // -- quantities: value of trained token j, share of the scale, legend ------------------------------------------------
  const largest = (t) => Math.max(1, ...views[state.view].weights[t].values);
  const QUANTITIES = {
    surprise: { value: (j) => -views[state.view].logProbs(j), share: (x) => x / 10, ends: () => ["0 (certain)", "10 nats or more"], name: "surprise -log p of the observed token, nats" },
    copies: { value: (j) => views[state.view].crossfit ? -views[state.view].crossfit(j) : 0, share: (x) => x / 10, ends: () => ["0 (certain)", "10 nats or more"], name: "surprise of copies that have not seen the row, nats" },
    entropy: { value: (j) => views[state.view].entropy(j), share: (x) => x / 7, ends: () => ["0 (certain)", "7 nats or more"], name: "entropy of the model's distribution, nats" },
    weight: { value: (j) => weightOf(state.target, j), share: (x) => Math.abs(x) / largest(state.target), ends: () => ["0 (ignored)", number(largest(state.target))], name: "label weight a (1 is SFT's)" },
    gradient: { value: (j) => movedOf(state.target, j) / movedMean(state.target), share: (x) => x / 4, ends: () => ["0", "4 x the mean token or more"], name: "the token's gradient, in units of the mean token's" },
    rank: { value: (j) => views[state.view].ranks[j] || null, share: (x) => x === null ? 1 : Math.log(x) / Math.log(topK() + 1), ends: () => ["1 (the model's favourite)", `beyond the ${topK()} listed`], name: "rank of the observed token" },
  };
  const clip = (x) => Math.max(0, Math.min(1, x));

  // -- rows -------------------------------------------------------------------------------------------------------------
  const list = $("list");
  const cards = rows.map((i, r) => {
    const card = el("div", { class: "row", tabindex: "0", "data-r": r, "aria-label": `row ${data.row_numbers[i] + 1}` });
    // a guess (4.4 characters a token, 130 a line of 24 pixels): the scroll bar hardly moves when the row is filled
    card.style.minHeight = Math.max(60, data.row_tokens[i] * 4.4 / 130 * 24 + 44) + "px";
    return card;
  });
  const near = new Set();
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const r = Number(entry.target.dataset.r);
      if (entry.isIntersecting) { near.add(r); if (!entry.target.firstChild) fill(r); }
      // emptied again, its height kept: a page may hold millions of tokens, and elements of all would not fit
      else if (near.delete(r)) { entry.target.style.minHeight = entry.target.offsetHeight + "px"; entry.target.replaceChildren(); }
    }
  }, { rootMargin: "900px 0px" });

  function facts(r) {
    const i = rows[r], v = data.views[state.view];
    return el("div", { class: "facts" },
      el("a", { href: `#row=${data.row_numbers[i] + 1}`, title: "link to this row" }, `row ${data.row_numbers[i] + 1}`),
      el("span", {}, `${data.row_trained[i]} of ${data.row_tokens[i]} tokens trained`),
      el("span", {}, `mean surprise ${number(v.row_nll[i])} nats`),
      v.row_crossfit ? el("span", {}, `to copies that have not seen it ${number(v.row_crossfit[i])} nats`) : null,
      el("span", {}, `mean label weight ${number(v.row_weight[state.target][i])}`),
      el("span", {}, `gradient ${number(v.row_moved[state.target][i] === null ? null : v.row_moved[state.target][i] / movedMean(state.target))} x the mean token`),
      data.groups ? el("span", {}, `${data.group}: `, ...QT.visible(data.groups[i])) : null,
      data.row_marked && data.row_marked[i] ? el("span", { class: "marked" }, "\u2691 marked as noise") : null);
  }
  function fill(r) {
    const text = el("div", { class: "text", dir: "ltr" });
    const first = offsets[r], count = offsets[r + 1] - first;
    let j = trainedOffsets[r];
    const whole = marks !== null && allMarked(r);
    for (let k = 0; k < count; k++) {
      const shown = texts[ids[first + k]];
      const token = el("span", { class: "tok", tabindex: "-1", "data-k": k }, shown === "" ? el("span", { class: "qt-control", title: "a token without text" }, "empty") : QT.visible(shown));
      if (trained[first + k]) {
        token.dataset.j = j;
        if (marks && marks[j] === 1) token.classList.add(whole ? "whole-noise" : "noise");
        j++;
      } else token.classList.add("masked");
      text.append(token);
    }
    cards[r].replaceChildren(facts(r), text);
    paint(r);
    cards[r].style.minHeight = "";
  }
  function allMarked(r) {
    // without the last trained token: an end mark stands behind the answer and is in no span
    for (let j = trainedOffsets[r]; j < trainedOffsets[r + 1] - 1; j++) if (marks[j] !== 1) return false;
    return true;
  }
  function paint(r) {
    const quantity = QUANTITIES[state.quantity];
    for (const token of cards[r].querySelectorAll("[data-j]")) {
      const { ground, ink } = QT.colour(clip(quantity.share(quantity.value(Number(token.dataset.j)))));
      token.style.backgroundColor = ground;
      token.style.color = ink;
    }
  }
  function repaint() {
    for (const r of near) { if (cards[r].firstChild) { cards[r].firstChild.replaceWith(facts(r)); paint(r); } }
    drawLegend();
  }
  function drawLegend() {
    const quantity = QUANTITIES[state.quantity], [low, high] = quantity.ends();
    const scale = el("span", { class: "scale", role: "img", "aria-label": `${quantity.name}: ${low} to ${high}` });
    scale.style.background = `linear-gradient(90deg, ${[0, .1, .2, .3, .4, .5, .6, .7, .8, .9, 1].map((s) => QT.colour(s).ground).join(",")})`;
    $("legend").replaceChildren(el("span", {}, quantity.name + ":"), el("span", {}, low), scale, el("span", {}, high),
      el("span", { class: "tok masked" }, "masked: not trained on"), ...(marks ? [el("span", { class: "tok noise" }, "marked as noise")] : []));
  }

  // -- sorting, search, links --------------------------------------------------------------------------------------------
  const SORTS = [
    ["surprising", "most surprising", () => { const x = data.views[state.view].row_nll; return (i) => x[i] === null ? -Infinity : x[i]; }],
    ["unsurprising", "least surprising", () => { const x = data.views[state.view].row_nll; return (i) => x[i] === null ? -Infinity : -x[i]; }],
    ...(data.views.some((v) => v.row_crossfit) ? [["copies", "most surprising to copies", () => { const x = data.views[state.view].row_crossfit || []; return (i) => x[i] === null || x[i] === undefined ? -Infinity : x[i]; }]] : []),
    ["weighted", "most down-weighted", () => { const x = data.views[state.view].row_weight[state.target]; return (i) => x[i] === null ? -Infinity : -x[i]; }],
    ["trained", "least trained on", () => { const x = data.views[state.view].row_moved[state.target]; return (i) => x[i] === null ? Infinity : -x[i] * data.row_trained[i]; }],
    ["order", "order in the data", () => (i) => -i],
    ...(data.row_marked ? [["marked", "marked as noise first", () => { const x = data.views[state.view].row_nll; return (i) => (data.row_marked[i] ? 1e6 : 0) + (x[i] === null ? 0 : x[i]); }]] : []),
  ];
  function sortRows() {
    const key = SORTS.find(([id]) => id === state.sort)[2]();
    const keys = rows.map(key);
    list.append(...rows.map((_, r) => r).sort((a, b) => keys[b] - keys[a] || a - b).map((r) => cards[r]));
  }
  let plainTexts = null;
  function textOf(r) {
    let out = "";
    for (let k = offsets[r]; k < offsets[r + 1]; k++) out += texts[ids[k]];
    return out.toLowerCase();
  }
  function search() {
    const wanted = $("search").value.trim().toLowerCase();
    plainTexts ||= wanted ? rows.map((_, r) => textOf(r)) : null;
    let shown = 0;
    rows.forEach((i, r) => {
      const hit = !wanted || String(data.row_numbers[i] + 1) === wanted || plainTexts[r].includes(wanted);
      cards[r].hidden = !hit;
      shown += hit;
    });
    $("count").textContent = `${shown.toLocaleString("en-US")} of ${data.row_numbers.length.toLocaleString("en-US")} rows`;
  }
  function follow() {
    const found = /^#row=(\d+)$/.exec(location.hash);
    if (!found) return;
    const r = rows.findIndex((i) => data.row_numbers[i] + 1 === Number(found[1]));
    if (r < 0) { QT.problem(`Row ${found[1]} is not in this page.`); return; }
    showTab("tokens");
    if (cards[r].hidden) { $("search").value = ""; search(); }
    list.querySelectorAll(".linked").forEach((card) => card.classList.remove("linked"));
    cards[r].classList.add("linked");
    if (!cards[r].firstChild) fill(r);
    cards[r].scrollIntoView({ block: "center" });
    // again after a frame, when rows above have been filled and have moved it
    requestAnimationFrame(() => { cards[r].scrollIntoView({ block: "center" }); cards[r].focus({ preventScroll: true }); });
  }

  // -- one token ----------------------------------------------------------------------------------------------------------
  async function explain(token) {
    const r = Number(token.closest(".row").dataset.r), k = Number(token.dataset.k), id = ids[offsets[r] + k];
    const head = el("div", { class: "tip-token" }, "\u201c", ...QT.visible(texts[id]), "\u201d");
    const place = `token ${k} of row ${data.row_numbers[rows[r]] + 1}, id ${vocabularyIds[id]}`;
    if (token.dataset.j === undefined) { QT.showTip(token, head, el("div", { class: "tip-facts" }, place), "Masked: nothing is trained here."); return; }
    const j = Number(token.dataset.j), view = views[state.view];
    const rank = view.ranks[j] ? `rank ${view.ranks[j]}` : topK() ? `beyond the top ${topK()}` : "rank not listed";
    const lines = [head, el("div", { class: "tip-facts" }, place),
      el("div", {}, `p ${number(Math.exp(view.logProbs(j)))}, log p ${number(view.logProbs(j))} nats, ${rank}, entropy ${number(view.entropy(j))} nats`),
      view.crossfit ? el("div", {}, `copies that have not seen the row: p ${number(Math.exp(view.crossfit(j)))}`) : null,
      marks && marks[j] === 1 ? el("div", {}, "\u2691 marked as noise") : null,
      QT.table("under each target", ["target", "label weight", "mass moved", "x mean token", "share of all gradient"], data.targets.map((name, t) =>
        [name, weightOf(t, j), movedOf(t, j), number(movedOf(t, j) / (data.views[state.view].summary[t].moved_mean || 1)), percent(movedOf(t, j) / ((data.views[state.view].summary[t].moved_mean || 1) * data.views[state.view].tokens))]))];
    QT.showTip(token, ...lines.filter(Boolean), ...await bars(r, j, id));
  }
  async function bars(r, j, id) {
    if (!detailed.has(rows[r])) return [el("div", { class: "qt-note" }, "The alternatives of this row are not in the page.")];
    await loadAlternatives(state.view);
    const view = views[state.view], found = view.alternatives, a = weightOf(state.target, j);
    if (!found) return [el("div", { class: "qt-note" }, "This model's numbers list no alternatives; score with --top_k 20.")];
    const at = detailed.get(rows[r]) + j - trainedOffsets[r], q = found.q[state.target], label = Math.exp(view.logProbs(j));
    const outcomes = [];
    for (let s = 0; s < found.slots; s++) {
      const p = found.probs(at * found.slots + s), other = found.ids[at * found.slots + s];
      if (p === null) continue;
      const observed = other === id;
      outcomes.push({ other, observed, p: observed ? label : p, q: q ? q(at * (found.slots + 1) + (observed ? found.slots : s)) : null });
    }
    if (!outcomes.some((o) => o.observed)) outcomes.push({ other: id, observed: true, p: label, q: q ? q(at * (found.slots + 1) + found.slots) : null });
    if (!q) for (const o of outcomes) o.q = (1 - a) * o.p + (o.observed ? a : 0);
    const known = outcomes.filter((o) => o.q !== null);
    outcomes.push({ other: null, observed: false, p: Math.max(0, 1 - outcomes.reduce((s, o) => s + o.p, 0)), q: 1 - known.reduce((s, o) => s + o.q, 0) });
    const cell = (kind, value) => { const fillBar = el("i"); fillBar.style.width = 100 * clip(value || 0) + "%"; return el("span", { class: `hold ${kind}` }, fillBar, el("b", {}, value === null ? "in the rest" : number(Math.abs(value) < 5e-4 ? 0 : value))); };
    return [el("div", { class: "bars" }, el("span", {}, "token"), el("span", {}, "p, the model"), el("span", {}, `Q of ${data.targets[state.target]}`),
      outcomes.flatMap((o) => [el("span", { class: o.observed ? "name observed" : "name" }, o.other === null ? "all others" : QT.visible(texts[o.other])), cell("p", o.p), cell("q", o.q)]))];
  }
  let current = null;
  // explain may wait for columns to be unpacked, and the pointer may be elsewhere by then
  const enter = (event) => { const token = event.target.closest(".tok"); if (token && list.contains(token)) { current = token; explain(token).then(() => { if (current !== token) QT.hideTip(); }); } };
  list.addEventListener("mouseover", enter);
  list.addEventListener("focusin", enter);
  const leave = (event) => { if (event.target.closest(".tok")) { current = null; QT.hideTip(); } };
  list.addEventListener("mouseout", leave);
  list.addEventListener("focusout", leave);
  list.addEventListener("keydown", (event) => {
    const card = event.target.closest(".row"), token = event.target.closest(".tok");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], line = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (!card || !step && !line) return;
    event.preventDefault();
    let next = null;
    if (line) { next = card[line]; while (next && next.hidden) next = next[line]; }
    else if (token) next = step > 0 ? token.nextElementSibling : token.previousElementSibling || card;
    else if (step > 0) next = card.querySelector(".tok[data-j]") || card.querySelector(".tok");
    if (next) { next.focus({ preventScroll: !line }); next.scrollIntoView({ block: "nearest" }); }
  });
  addEventListener("scroll", () => { if (current && !current.matches(":focus")) { current = null; QT.hideTip(); } }, { passive: true });

  // -- the other tabs --------------------------------------------------------------------------------------------------
  function drawDistribution() {
    const v = data.views[state.view], section = $("distribution");
    const perTarget = (part, field) => part.targets.map((t) => ({ name: t.target, values: t[field] }));
    const deciles = v.deciles, bounds = deciles.names.map((n, i) => deciles.counts[i] ? `${n}: p ${number(deciles.p_low[i])} to ${number(deciles.p_high[i])}` : n);
    const even = { name: "even share", values: deciles.names.map(() => 0.1) };
    const h = v.histogram;
    section.replaceChildren(el("p", {}, `${v.model}: ${v.tokens.toLocaleString("en-US")} trained tokens, mean surprise ${number(v.nll_mean)} nats, mean entropy ${number(v.entropy_mean)} nats.`),
      QT.table("Each target over all of them. Effective tokens: how many equally weighted tokens would average as well, (sum a)^2 / sum a^2. Loss kept: sum of a x -log p, as a share of SFT's. Mass moved: mean 1/2 |p - Q|, the size of the gradient.",
        ["target", "mean label weight", "mean residual weight", "mean mass moved", "effective tokens", "loss kept"],
        v.summary.map((s) => [s.target, s.label_weight_mean, s.residual_weight_mean, s.moved_mean, percent(s.effective_sample_share), percent(s.loss_kept)])),
      QT.barChart({ title: "How likely the model finds the labels", x: "p of the observed token", y: "tokens", labels: h.counts.map((_, i) => `${number(h.edges[i])}-${number(h.edges[i + 1])}`), series: [{ name: "tokens", values: h.counts }] }),
      QT.barChart({ title: "Share of the label weight, by decile of p", x: "tenth of the tokens, least likely first", y: "share of the weight", labels: bounds.map((b) => b.split(":")[0]), series: [...perTarget(deciles, "weight_share"), even], caption: `Bounds: ${bounds.join("; ")}.` }),
      QT.barChart({ title: "Share of the gradient, by decile of p", x: "tenth of the tokens, least likely first", y: "share of the gradient", labels: deciles.names, series: [...perTarget(deciles, "gradient_share"), even] }),
      QT.lineChart({ title: "Surprise and entropy by position in the answer", x: "trained tokens before it in the row", y: "nats", series: ["nll", "entropy"].map((f) => ({ name: f === "nll" ? "surprise" : f, points: v.positions[f].map((y, i) => [i, y, v.positions.names[i]]) })), xticks: v.positions.names.map((n, i) => [i, n]) }),
      QT.lineChart({ title: "Mean label weight by position in the answer", x: "trained tokens before it in the row", y: "mean label weight", series: v.positions.targets.map((t) => ({ name: t.target, points: t.weight_mean.map((y, i) => [i, y, v.positions.names[i]]) })), xticks: v.positions.names.map((n, i) => [i, n]) }),
      ...(v.groups ? [QT.table(`By ${data.group}`, [data.group, "tokens", "mean surprise", "mean entropy", ...data.targets.flatMap((t) => [`${t}: weight`, `${t}: share of the gradient`])],
        v.groups.names.map((n, i) => [el("span", {}, QT.visible(n)), v.groups.counts[i], v.groups.nll[i], v.groups.entropy[i], ...v.groups.targets.flatMap((t) => [t.weight_mean[i], percent(t.gradient_share[i])])]))] : []));
  }
  /** Every score's curve, at most seven to a chart. */
  function rocCharts(found) {
    const chance = { name: "chance", points: [[0, 0], [1, 1]] };
    return Array.from({ length: Math.ceil(found.length / 7) }, (_, i) => QT.lineChart({ title: "ROC", x: "share of the unmarked that is flagged", y: "share of the marked that is found", range: [0, 1],
      series: [...found.slice(7 * i, 7 * i + 7).map((f) => ({ name: f.score, points: f.curve })), chance] }));
  }
  function drawMarks() {
    const m = data.views[state.view].marks, section = $("marks");
    const part = (title, found, count, of, unit) => [el("h2", {}, `${title}: ${count.toLocaleString("en-US")} of ${of.toLocaleString("en-US")} ${unit} marked`),
      QT.table("Area under the ROC curve: the chance that a marked one scores higher than an unmarked one; 0.5 is a coin. Numbers of " + data.views[state.view].model + ".", ["score", "AUC", ...(unit === "rows" ? ["95 % interval (bootstrap)"] : [])],
        found.map((f) => [f.score, f.auc, ...(unit === "rows" ? [f.interval ? `${number(f.interval[0])} .. ${number(f.interval[1])}` : "fewer than 10 marked or unmarked"] : [])])),
      ...rocCharts(found.filter((f) => f.curve.length))];
    section.replaceChildren(...part("By row", m.by_row, m.marked_rows, m.rows, "rows"), ...(m.unplaced_rows ? [el("p", { class: "qt-note" }, `The spans of ${m.unplaced_rows} rows could not be found in their tokens; they count in no curve of tokens.`)] : []), ...(m.by_token ? part("By token", m.by_token, m.marked_tokens, m.tokens, "tokens") : []));
  }
  function rowLinks(numbers) { return numbers.flatMap((n) => [" ", el("a", { href: `#row=${n + 1}` }, `row ${n + 1}`)]); }
  function drawAudit() {
    const audit = data.audit, advice = audit.which_target;
    const statement = (s, word) => el("li", {}, el("strong", {}, word + s.targets.join(", ")), ": ", ...QT.visible(s.reason), " ", el("span", { class: "qt-note" }, [...new Set(s.evidence.map((e) => e.file))].join(", ")));
    $("audit").replaceChildren(el("h2", {}, `${audit.errors ? `${audit.errors} kind${audit.errors === 1 ? "" : "s"} of errors` : "No errors"} in ${audit.rows.toLocaleString("en-US")} rows`),
      ...audit.findings.map((f) => el("div", { class: `finding ${f.severity}` }, el("p", {}, el("strong", {}, `${f.severity}: ${f.check}, ${f.count.toLocaleString("en-US")} rows. `), ...QT.visible(f.message), ...rowLinks(f.rows)),
        f.evidence.examples && f.evidence.examples.length ? el("details", {}, el("summary", {}, "examples"), ...f.evidence.examples.map((e) => el("p", {}, ...QT.visible(JSON.stringify(e, null, 1))))) : null)),
      ...(advice ? [el("h2", {}, "Which target?"), el("p", {}, ...QT.visible(advice.summary)), el("ol", {}, advice.ranked.map((s) => statement(s, ""))), el("ul", {}, advice.avoid.map((s) => statement(s, "not "))), ...advice.notes.map((n) => el("p", { class: "qt-note" }, ...QT.visible(n)))] : []));
  }
  function drawAbout() {
    $("about").replaceChildren(el("dl", { class: "about" }, data.about.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, ...QT.visible(String(text)))])),
      ...data.notes.map((note) => el("p", {}, note)),
      ...(Object.keys(data.hidden).length ? [el("h2", {}, "Targets that are not shown"), el("ul", {}, Object.entries(data.hidden).map(([name, why]) => el("li", {}, el("strong", {}, name), ": " + why)))] : []));
  }

  // -- start ------------------------------------------------------------------------------------------------------------
  const options = (id, pairs) => $(id).append(...pairs.map(([value, label]) => el("option", { value }, label)));
  options("view", data.views.map((v, i) => [i, v.model]));
  options("target", data.targets.map((t, i) => [i, t]));
  options("sort", SORTS);
  if (data.views.some((v) => v.row_crossfit)) options("quantity", [["copies", "surprise of copies that have not seen the row"]]);
  $("view").closest("label").hidden = data.views.length < 2;
  await loadView(0);
  const draw = { distribution: drawDistribution, marks: drawMarks, audit: drawAudit, about: drawAbout };
  const showTab = QT.tabs($("tabs"), [["tokens", "Tokens"], ["distribution", "Distribution"], ...(data.views[0].marks ? [["marks", "Noise marks"]] : []), ...(data.audit ? [["audit", "Audit"]] : []), ["about", "About this page"]],
    (id) => draw[id] && draw[id]());
  $("target").addEventListener("change", () => { state.target = Number($("target").value); if (["weighted", "trained"].includes(state.sort)) sortRows(); repaint(); });
  $("quantity").addEventListener("change", () => { state.quantity = $("quantity").value; repaint(); });
  $("sort").addEventListener("change", () => { state.sort = $("sort").value; sortRows(); scrollTo(0, 0); });
  // another view may be chosen while this one is unpacked
  $("view").addEventListener("change", async () => { const chosen = Number($("view").value); await loadView(chosen); if (Number($("view").value) !== chosen) return; state.view = chosen; sortRows(); repaint(); drawDistribution(); if (data.views[0].marks) drawMarks(); });
  let waiting = 0;
  $("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
  QT.onTheme(repaint);
  new ResizeObserver(() => { document.documentElement.style.scrollPadding = `${$("bar").offsetHeight + 8}px 0 1em`; }).observe($("bar"));
  sortRows();
  cards.forEach((card) => observer.observe(card));
  search();
  drawLegend();
  addEventListener("hashchange", follow);
  follow();
  document.documentElement.dataset.ready = "1";
})();
