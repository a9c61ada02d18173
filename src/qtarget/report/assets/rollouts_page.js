// The page of `qtarget inspect RUN`: what trust regions make of the samples that the run kept.
"use strict";
(() => {
  const { el, table, number, percent, visible, data } = QT;
  document.getElementById("summary").append(
    table(`Over ${data.count} samples${data.target ? `, trained with ${data.target}` : ""}; tokens with an advantage`, ["region", "tokens", "mean weight", "blocked", "corrective"],
      data.summary.map((one) => [el("bdi", {}, visible(one.region)), one.tokens, number(one.mean), percent(one.blocked), percent(one.corrective)])));
  QT.completions(document.getElementById("completions"), data.runs);
})();
