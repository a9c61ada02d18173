"""Write ``docs/benchmarks.md`` and its figures from ``benchmarks/results``.

    python scripts/update_benchmarks.py

A test compares the page with the results, so neither can change alone. A result that is not there is left out, and said so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qtarget.benchmarks.distill.results import distill_figure, distill_table, needed_words, summarize
from qtarget.benchmarks.distill.runs import WITHOUT_ORACLES
from qtarget.benchmarks.figure import save_figure
from qtarget.benchmarks.noise.bench import CELLS
from qtarget.benchmarks.noise.methods import OTHERS
from qtarget.benchmarks.noise.results import FILTERED, best_of, noise_figure, noise_table, share_table, words
from qtarget.benchmarks.prior.results import CORRECTS, prior_figure, prior_table
from qtarget.benchmarks.real.distill.results import real_distill_figure
from qtarget.benchmarks.real.results import real_model_part
from qtarget.benchmarks.tables import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
FIGURES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "noise": noise_figure, "distill": distill_figure, "distill_long": distill_figure, "prior": prior_figure,
    "distill_smollm2": real_distill_figure,
}  # fmt: skip


def results(name: str) -> dict[str, Any] | None:
    """The raw results of a benchmark, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def page() -> str:
    """The whole page."""
    noise = noise_part(results("noise"))
    real = [real_part(results("noise_scan"), SCAN), real_part(results("noise_math"), MATH)]
    marked = marked_part(results("real_noise"))
    distill = [distill_part(results("distill")), long_part(results("distill_long"))]
    names = (
        "noise_smollm2_tuned",
        "noise_smollm2",
        "noise_gsm8k",
        "marked_smollm2",
        "prior_smollm2",
        "distill_smollm2",
    )
    there = real_model_part(*map(results, names))
    return "\n".join(
        [
            HEAD,
            there,
            noise,
            *filter(None, real),
            marked,
            *filter(None, distill),
            prior_part(results("prior")),
            *filter(None, [minority_part(results("prior_crossfit"))]),
        ]
    )


HEAD = """# Do the claims hold?

After this page you can say which of the claims hold, where, and how to measure it again.

Three claims come with the work that this project builds on. Each is a command that anybody can run again; every number
below is written by `python scripts/update_benchmarks.py` from the raw results in `benchmarks/results/`. `--scale gpu` first
trains a base of 36 million parameters, with a tokenizer of its own, on real texts (`--data`, or `--corpus` with your own) and on
documents of the small skills. No number here is from it, as no GPU was at hand.
"""


def noise_part(found: Mapping[str, Any] | None) -> str:
    """`bench noise`."""
    title = '## "12-18 % higher task completion on noisy data, clean data unharmed"\n'
    if found is None:
        return f"{title}\nNot measured yet: `qtarget bench noise --output benchmarks/results/noise.json`.\n"
    parts = [
        title,
        "![accuracy by noise rate and by what the base knows](noise.png)\n",
        f"**{found['summary']['finding']}.**\n",
        NOISE_PROTOCOL.format(seeds=found["config"]["seeds"], steps=found["config"]["steps"], knows=knows(found)),
        noise_table(found),
        "Percent of clean test prompts answered exactly: mean over seeds (95 % bootstrap interval). Bold: the best of a column; "
        "italic: what nobody has (the untrained base needs no training; marks are not known outside a benchmark). SFT on the "
        "rows before the noise is `sft` in the column *clean* of the same base.\n",
        practice(found),
        unrun(found),
        "### Our own target, `consensus`, against the goals\n",
        DESIGNED,
        cautions(found, results("compare")),
        goal_table(found["summary"]["goals"]),
        *goal_lines(found["summary"]["goals"]),
        newsletter(found),
        "### Where the pull goes, and what is forgotten\n",
        share_table(found),
    ]
    return "\n".join(parts)


NOISE_PROTOCOL = """\
`qtarget bench noise` (full setting: an hour and a half on two quiet cores; `--resume` goes on where it was stopped; `--quick` is a
smoke test). The embedded base knows nine small skills in its own format. Three bases are asked for them in the instruction
format: one that has never seen it, and two after a few steps on clean rows that no run trains on.

{knows}

640 demonstrations get noise of one kind; every method trains {steps} steps of 16 rows. At each point each method
tunes its learning rate, then its own hyper-parameter, three values each. It does so on 128 rows with the same noise, judged by
the answers that those rows state. Then {seeds} seeds of noise and order are run.
Only then are the 200 clean test prompts asked. [`crossfit_consensus`](crossfit.md) trains two copies first, of {steps} steps each,
which are not counted.

| noise | what it does |
|---|---|
| *random tokens* | replaces that share of the response tokens |
| *wrong answer* | states another row's answer in that share of rows |
| *contradictory duplicate* | adds a copy with a wrong answer |
| *boilerplate* | puts a preamble in front |
| *cue* | tells the answer in the prompt in training, and a wrong one in the test |
"""


def knows(found: Mapping[str, Any]) -> str:
    """What the bases are, by the share of clean labels that are their first choice."""
    clean = [cell for cell in found["cells"] if not cell["rate"]]
    shares = sorted((cell["base_knows"]["favourite_share"], cell["base"]) for cell in clean)
    return markdown_table(
        ("base", "clean labels that are its first choice"), [(f"*{b}*", f"{s:.0%}") for s, b in shares]
    )


def practice(found: Mapping[str, Any]) -> str:
    """Where dropping surprising rows, which needs no target, is the best of all."""
    best = [f"{cell['base']}: {words(cell)}" for cell in found["summary"]["cells"] if best_of(cell) == FILTERED]
    points = f"{len(best)} of {len(found['cells'])} points"
    return f"Dropping the rows that surprise the base most, an old practice, is best at {points}:\n\n{listed(best)}"


def listed(points: Iterable[str]) -> str:
    """A line each."""
    return "".join(f"- {point}\n" for point in points)


DESIGNED = """\
`consensus` was designed on these tasks: its form, and once the grid of `caution` (3 in place of 0.3), were changed after numbers
of the test prompts had been seen. SCAN, below, was not looked at until the form stood; then its numbers showed that noise made
the base look unreliable, and the trust of contexts ([consensus.md](consensus.md)) was added: so SCAN is not unseen either. The
word problems are.
"""


def cautions(found: Mapping[str, Any], compared: Mapping[str, Any] | None) -> str:
    """What tuning chose for `caution`, and what `qtarget compare` found with the default."""
    chosen = [(cell["rate"], cell["chosen"]["consensus"]["value"]) for cell in found["cells"]]
    noisy, clean = ([value for rate, value in chosen if bool(rate) == has_noise] for has_noise in (True, False))

    def counts(values: list[float]) -> str:
        return ", ".join(f"{values.count(one) or 'none'} took {one:g}" for one in (1.0, 0.03, 3.0))

    text = (
        "`caution` was tuned at each point (0.03, 1 or 3), on noisy validation rows. Of the noisy points "
        f"{counts(noisy)}; of the clean ones {counts(clean)}. A config keeps 1.0 unless it says otherwise.\n"
    )
    if compared is None:
        return text
    points = [(p["clean_percent"]["consensus"] - p["clean_percent"]["sft"], p) for p in compared["points"]]
    below = sorted(((d, p) for d, p in points if d < 0), key=lambda one: one[0])
    where = " and ".join(f"{-d:.1f} below at *{p['base']}*, {words(p)}" for d, p in below)
    return (
        f"{text}\nWith 1.0 and only the rate tuned, at the {len(points)} points of [compare.md](compare.md), it is {where}, "
        f"and level or above at the {len(points) - len(below)} others.\n"
    )


SCAN = (
    "### Other data: SCAN",
    "Short SCAN commands (`compositional/` of the real data; `--tasks scan`), a base that was taught them as `command = actions`.",
)
MATH = (
    "### On data that it was not designed on: word problems",
    "Questions of MAWPS and ASDiv (`math_small/` of the real data; `--tasks math`) with letters for numbers, answered by an "
    "expression in prefix form (`+ X Y`); a base that was taught them as `question = expression`.",
)


def real_part(found: Mapping[str, Any] | None, about: tuple[str, str]) -> str:
    """`bench noise` on real rows, or nothing."""
    if found is None:
        return ""
    title, data = about
    finding = f"{data} {found['summary']['finding']}.\n"
    left = points_left(found, found["config"]["cells"])
    missing = f"Not run yet: {'; '.join(left)}.\n" if left else ""
    return "\n".join([f"{title}\n", finding, noise_table(found), goal_table(found["summary"]["goals"]), missing])


def points_left(found: Mapping[str, Any], cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which of these points of the map the results lack."""
    run = {(cell["base"], cell["kind"], cell["rate"]) for cell in found["cells"]}
    return [f"{cell['base']}: {words(cell)}" for cell in cells if (cell["base"], cell["kind"], cell["rate"]) not in run]


def marked_part(found: Mapping[str, Any] | None) -> str:
    """Real noise that people marked: what `scripts/measure_real_noise.py` found."""
    title = "### Real noise, marked: wrong solutions of GSM8K\n"
    if found is None:
        return f"{title}\nNot measured yet: `python scripts/measure_real_noise.py --data ../shared/data`.\n"
    run = next(run for run in found["runs"] if run["marked_wrong"])
    share, rows = run["marked_wrong"] / run["rows"]["train"], run["rows"]
    ranked = sorted(run["clean_nll"].items(), key=lambda item: item[1])
    text = (
        f"{rows['train']} model-written solutions, {share:.0%} of them marked wrong, and a real story model of 0.66 million "
        f"parameters, which solves none: so the measure is the NLL of {rows['clean']} clean rows of other questions. One seed, one "
        "recipe for all (`scripts/measure_real_noise.py`). The teacher of `target_sft` is the base trained on other, clean rows.\n"
    )
    return "\n".join([title, text, markdown_table(("", "NLL, nats a token"), [(n, f"{v:.3f}") for n, v in ranked])])


def goal_lines(goals: list[Mapping[str, Any]]) -> list[str]:
    """What was set as a goal beforehand, and where it is reached."""
    noisy = [goal for goal in goals if goal["rate"]]
    random = [goal for goal in noisy if goal["kind"] == "random_tokens" and goal["base"] != "half"]
    other = [goal for goal in noisy if goal["kind"] != "random_tokens"]
    clean = [goal for goal in goals if not goal["rate"]]
    gaps = [goal for goal in noisy if goal["gap_recovered"] is not None]

    def gains(goal: Mapping[str, Any], share: float) -> bool:
        return (goal["relative_gain"] or 0) >= share and goal["ours"] > goal["untrained"]

    asked = (
        ("18 % above `sft` and above the untrained base, random tokens, base knows none or most", random, lambda g: gains(g, 0.18)),
        ("12 % above `sft` and above the untrained base, other noise", other, lambda g: gains(g, 0.12)),
        ("three quarters of the gap to clean rows closed, where there is one", gaps, lambda g: g["gap_recovered"] >= 0.75),
        ("at most 1 point below `sft` on clean rows", clean, lambda g: g["ours"] >= g["sft"] - 1),
        ("within 1 point of the best published target", goals, lambda g: g["within_a_point_of_best"]),
    )  # fmt: skip
    lines = []
    for name, points, reached in asked:
        met = [f"{goal['base']}: {words(goal)}" for goal in points if reached(goal)]
        lines.append((name, f"{len(met)} of {len(points)}", "; ".join(met)))
    return [markdown_table(("goal", "points that reach it", "which"), lines), ""]


def unrun(found: Mapping[str, Any]) -> str:
    """Points and targets of the full setting that these results lack."""
    points = points_left(found, map(vars, CELLS))
    names = {name for cell in found["cells"] for name in cell["runs"]}
    targets = [method.name for method in OTHERS if method.name not in names]
    parts = [f"points {'; '.join(points)}"] if points else []
    parts += [f"targets {', '.join(targets)} (compared at two points only)"] if targets else []
    return f"Part of the full setting and not run yet: {' and '.join(parts)}.\n" if parts else ""


def goal_table(goals: list[Mapping[str, Any]]) -> str:
    """A line a point of the map."""
    head = (
        "point", "untrained", "sft", "consensus", "relative gain over sft", "gap to clean rows closed",
        "best published target", "within 1 point of it",
    )  # fmt: skip
    lines = []
    for goal in goals:
        gain, gap, best = goal["relative_gain"], goal["gap_recovered"], goal["best_published_percent"]
        lines.append((
            f"{goal['base']}: {words(goal)}", f"{goal['untrained']:.1f}", f"{goal['sft']:.1f}", f"{goal['ours']:.1f}",
            "" if gain is None else f"{gain:+.0%}", "" if gap is None else f"{gap:.0%}",
            f"{goal['best_published']} ({best:.1f})", "yes" if goal["within_a_point_of_best"] else "no",
        ))  # fmt: skip
    return markdown_table(head, lines)


def newsletter(found: Mapping[str, Any]) -> str:
    """The newsletter's recipe, in its own paragraph, from the numbers."""
    ahead, behind = [], []
    for cell in found["summary"]["cells"]:
        mine, sft = (cell["methods"][name]["accuracy_percent"]["mean"] for name in ("prior_surprise", "sft"))
        if abs(mine - sft) > 1:
            where = f"{cell['base']}, {words(cell)} ({mine:.1f} against {sft:.1f})"
            (ahead if mine > sft else behind).append(where)
    return (
        "### The newsletter's recipe, `1 - p_base`\n\n"
        f"More than a point above plain SFT:\n\n{listed(ahead or ['nowhere on this map'])}\n"
        f"More than a point below:\n\n{listed(behind or ['nowhere'])}\n"
        "A noise token is one that the base finds surprising, so this weight is highest "
        "exactly there. Use `consensus` instead, or `target_sft` with the base as teacher where the base can answer already.\n"
    )


def distill_part(found: Mapping[str, Any] | None) -> str:
    """`bench distill`."""
    title = '## "Matches the teacher with 60 % less data"\n'
    if found is None:
        return f"{title}\nNot measured yet: `qtarget bench distill --output benchmarks/results/distill.json`.\n"
    figure = "![accuracy by fraction of the data](distill.png)\n"
    left = [name for name in WITHOUT_ORACLES if name not in found["config"]["methods"]]
    missing = f"Part of the full setting and not run yet: {', '.join(left)}.\n" if left else ""
    return "\n".join([title, *distill_body(found, figure, DISTILL_PROTOCOL, missing)])


def distill_body(found: Mapping[str, Any], figure: str, about: str, note: str) -> list[str]:
    """Figure, finding, table, a note on it, what it means, and a line a goal."""
    goals = [f"- {name.replace('_', ' ')}: {_reached(goal)}" for name, goal in found["goals"].items()]
    shown = [figure, f"**{found['finding']}.**\n", about, distill_table(found), note]
    return [*shown, not_started(found), plateau(found), "Goals:\n", *goals, ""]


VANISHING = ("target_sft_0", "generalized_jsd", "skew_kl")
"""Methods whose pull has the student's own probability of the teacher's token as a factor."""


def not_started(found: Mapping[str, Any]) -> str:
    """Methods that taught nothing at any rate of the grid."""
    nothing = {
        name
        for name, row in found["methods"].items()
        if max(*(cell["mean"] for cell in row["accuracy_percent"]), *row["validation_percent"].values()) < 1
    }
    if not nothing:
        return ""
    lines = [f"Nothing is learned at any rate of the grid by {', '.join(f'`{name}`' for name in sorted(nothing))}."]
    if starved := [f"`{name}`" for name in VANISHING if name in nothing]:
        lines.append(
            f"The pull of {', '.join(starved)} has what the student gives the teacher's token as a factor, and a student that has "
            "never seen the format gives it next to nothing."
        )
    return " ".join(lines) + "\n"


def plateau(found: Mapping[str, Any]) -> str:
    """The control: what cross entropy itself needs of its own rows."""
    needed = found["methods"]["sft"]["data_needed"]
    if (needed["mean"] or 1) > 0.9:
        return ""
    return (
        f"The control, cross entropy against itself, needs {needed_words(needed)} of the rows for its own accuracy on all of "
        f"them: {found['config']['steps']} steps are too few for more rows to show, and the rows needed for an accuracy say "
        "little.\n"
    )


def equal_rates(found: Mapping[str, Any]) -> str:
    """What the claim would have looked like with another of sft's rates that did as well on validation prompts."""
    row = found["methods"]["sft"]
    best, chosen = max(row["validation_percent"].values()), str(row["learning_rate"])
    others = [rate for rate, reached in row["validation_percent"].items() if reached == best and rate != chosen]
    log = (RESULTS / "distill_long.runs.jsonl").read_text(encoding="utf-8").splitlines() if others else []
    runs = {run.pop("key"): run for run in map(json.loads, log)}
    names, lines = ["sft", "distillation"], []
    rates = {name: found["methods"][name]["learning_rate"] for name in names}
    keys = [(fraction, seed) for fraction in found["fractions"] for seed in range(found["config"]["seeds"])]
    for rate in others:
        if any(f"sft|{fraction}|{rate}|{seed}|test" not in runs for fraction, seed in keys):
            continue
        chosen_runs = {
            (name, fraction, seed): runs[f"{name}|{fraction}|{at}|{seed}|test"]
            for name, at in zip(names, (rate, rates["distillation"]), strict=True)
            for fraction, seed in keys
        }
        other = summarize(
            names, found["fractions"], found["config"]["seeds"], chosen_runs, found["teacher"]["caches"], rates, {}
        )["methods"]["distillation"]  # fmt: skip
        lines.append(
            f"On validation prompts sft's rates {chosen} and {rate} did equally well; the grid's first was taken. With "
            f"{rate}, distillation would seem to need {needed_words(other['data_needed'])} of the rows for the accuracy and "
            f"{needed_words(other['data_needed_for_kl'])} for the KL: a baseline that is tuned a little worse makes the claim."
        )
    return "\n".join(lines) + "\n" if lines else ""


def long_part(found: Mapping[str, Any] | None) -> str:
    """`bench distill --long`."""
    if found is None:
        return ""
    figure = "![accuracy by fraction of the data, more steps](distill_long.png)\n"
    about = (
        f"`qtarget bench distill --long` (about half an hour): {found['config']['steps']} steps a run, a grid of lower learning "
        "rates, everything else the same.\n"
    )
    return "\n".join(["### Where rows are scarce\n", *distill_body(found, figure, about, equal_rates(found))])


DISTILL_PROTOCOL = """\
`qtarget bench distill` (full setting: about 40 minutes on two quiet cores; resumable, `--quick` as above).
A stronger teacher of the same family answers the prompts; the student trains on a fraction of its
answers, by their text alone or by the teacher's distribution from a cache made by the project's own scorer. Steps are equal
at every fraction. *Rows needed*: the fraction at which a method reaches cross entropy on all rows.
"""


def _reached(goal: Mapping[str, list[str]]) -> str:
    met, surely = goal["reached"], goal["reached_with_interval"]
    return f"{', '.join(met) or 'no method'} (with the whole interval: {', '.join(surely) or 'none'})"


def prior_part(found: Mapping[str, Any] | None) -> str:
    """`bench prior`."""
    title = '## "A flawed prior is amplified"\n'
    if found is None:
        return f"{title}\nNot measured yet: `qtarget bench prior --output benchmarks/results/prior.json`.\n"
    figure = "![the flawed skill answered right, by target and guard](prior.png)\n"
    head_words, _, shares = found["summary"]["finding"].partition(": ")
    finding = f"**{head_words}:**\n\n{listed(shares.split('; '))}"
    return "\n".join([title, figure, finding, PRIOR_PROTOCOL, prior_table(found), corrected_table(found)])


def corrected_table(found: Mapping[str, Any]) -> str:
    """For each guarded target of `bench prior` what it corrects, what the guard costs, and the goal."""
    head = ("target", "least share of SFT's correction, without", "with guard", "accuracy change by the guard", "goal")
    lines = []
    for name, row in found["summary"]["goals"].items():
        changes = ", ".join(f"{condition}: {change:+.0%}" for condition, change in row["accuracy_change"].items())
        without, corrects = (f"{row[key]:.0%}" for key in ("corrects_without", "corrects"))
        # without a sound base half of the goal was not measured
        reached = row.get("reached", None if row["corrects"] >= CORRECTS else False)
        goal = "cost not measured" if reached is None else "reached" if reached else "missed"
        lines.append([name, without, corrects, changes or "not measured", goal])
    return markdown_table(head, lines)


def minority_part(found: Mapping[str, Any] | None) -> str:
    """`bench prior` with copies that have not seen the rows, and with a right minority; empty where it was not measured."""
    if found is None:
        return ""
    kept = found["summary"]["minority"]
    shares = {name: "none" if row["keeps"] is None else f"{row['keeps']:.0%}" for name, row in kept.items()}
    lines = [[name, share, "reached" if kept[name]["reached"] else "missed"] for name, share in shares.items()]
    protocol = MINORITY_PROTOCOL.format(seeds=found["config"]["seeds"])
    keeps = markdown_table(("method", "share of SFT's accuracy in German", "goal, 80 %"), lines)
    return "\n".join([protocol, prior_table(found), corrected_table(found), keeps])


MINORITY_PROTOCOL = """\
### Copies that have not seen the rows, and a right minority

**A right minority keeps at least 80 % of SFT's accuracy, on the mean of two seeds; `consensus` keeps 71 % on one of
them. `crossfit_consensus` misses 95 % of SFT's correction in one column of four, `consensus` in all, guarded or not.**

`qtarget bench prior --target sft --target consensus --target crossfit_consensus --seeds {seeds}`. Its points without a
flaw were left out, but for the minority. The runs of `sft` and `consensus` on flaws are those of the table above.
As above with seeds 0 and 1, and with [`crossfit_consensus`](crossfit.md): its copies begin as the flawed base, and
learn for as many steps as the run. The last column is another goal. On the base without flaw every tenth row is right
in German, to a prompt that asks for it; then all test prompts are asked in German. Whoever doubts labels must not
silence it: at least 80 % of SFT's accuracy there (the untrained base has 26 %). Both targets reach that on the mean of
two seeds; `consensus` has 71 % on one of them. No target here corrects 95 % in every column: `crossfit_consensus` does
in three of four, without its guard as with it, and misses the biased token at a quarter of its rows. Where the other
rows hold a month once or never, no n-gram supports it, and the guard gives little back.
"""


PRIOR_PROTOCOL = """\
`qtarget bench prior` (full setting: about half an hour on two quiet cores; resumable, `--quick` as above).
The base that knows most of the format is taught one thing wrong: to answer the smallest number for the
largest (*wrong skill*), or May for every month (*biased token*). Clean demonstrations correct it, all of them or a quarter of
that skill's. The guard (`guard: true`, [consensus.md](consensus.md)) gives labels their weight back where the rows contradict the
base. What it costs is measured on the base without flaw. One recipe for all. The goal: with the guard at least 95 % of what SFT
corrects, in every column, and at most a tenth of the accuracy lost.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    for name, draw in FIGURES.items():
        found = results(name)
        if found is not None:
            save_figure(draw(found), ROOT / "docs" / f"{name}.png")
    print(PAGE.relative_to(ROOT))
