"""Write README.md, docs/targets.md and docs/performance.md from their ``.in`` files.

The tables of targets and measured speed are put in, never typed. The table of situations is the README's.

python scripts/update_docs.py
"""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path

from qtarget.benchmarks.distill.results import needed_words
from qtarget.benchmarks.noise.results import FILTERED, best_of
from qtarget.cli.targets import target_rows

ROOT = Path(__file__).parents[1]


def targets_table() -> str:
    """One line for each target."""
    lines = ["| name | loss at a token | needs | paper |", "|---|---|---|---|"]
    for row in target_rows():
        formula = row["formula"].replace("|", "\\|")
        lines.append(f"| `{row['name']}` | `{formula}` | {', '.join(row['needs']) or '-'} | {row['paper']} |")
    return "\n".join(lines)


def real_table() -> str:
    """Clean held-out NLL of the real-data example, from its raw results."""
    runs = json.loads((ROOT / "benchmarks/results/real_noise.json").read_text())["runs"]
    lines = ["| | " + " | ".join(f"`{r['data']}`" for r in runs) + " |", "|---|" + "---|" * len(runs)]
    for name in runs[0]["clean_nll"]:
        lines.append(f"| {name} | " + " | ".join(f"{r['clean_nll'][name]:.3f}" for r in runs) + " |")
    return "\n".join(lines)


SPEED = {
    "N=2,048 V=49,152, float32": "speed_cpu_float32_49152.json",
    "N=1,024 V=151,936, float32": "speed_cpu_float32_151936.json",
    "N=2,048 V=49,152, bfloat16 (another machine, older code)": "speed_cpu_bfloat16_avx512_49152.json",
}


def results_of(name: str) -> dict:
    """One file of raw results."""
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def speed_table() -> str:
    """Ratios to the floor, one column a shape, in the order the contenders ran."""
    shapes = {shape: name for shape, name in SPEED.items() if (ROOT / "benchmarks/results" / name).exists()}
    columns = [results_of(name)["rows"] for name in shapes.values()]
    names = list(dict.fromkeys(name for rows in columns for name in rows if not name.startswith("floor, ")))
    lines = ["| x floor (lowest .. highest round) | " + " | ".join(shapes) + " |", "|---|" + "---|" * len(columns)]
    for name in names:
        cells = []
        for rows in columns:
            ratio = rows.get(name, {}).get("ratio")
            cells.append(f"{ratio['median']:.2f} ({ratio['low']:.2f} .. {ratio['high']:.2f})" if ratio else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


MEMORY_TOKENS = (512, 8192, 65_536)
"""Numbers of tokens of the README's table; the picture has them all."""


def memory_table() -> str:
    """Peak memory beyond inputs and gradients, by loss, shape and number of tokens."""
    sweep = results_of("sweep_cpu_float32.json")
    shapes = [(vocab, width, tokens) for vocab, width in sweep["config"]["shapes"] for tokens in MEMORY_TOKENS]
    points = {(p["loss"], p["vocab"], p["width"], p["tokens"]): p for p in sweep["memory"]}
    shapes = [shape for shape in shapes if ("sft", *shape) in points]
    lines = [
        "| MB | " + " | ".join(f"V={v:,} D={w} N={n:,}" for v, w, n in shapes) + " |",
        "|---|" + "---|" * len(shapes),
    ]
    for name in dict.fromkeys(loss for loss, *_ in points):
        cells = [memory_cell(points.get((name, *shape))) for shape in shapes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_cell(point: dict | None) -> str:
    """MB beyond inputs and gradients; empty where it was not measured."""
    if point is None:
        return ""
    if "computed" in point:
        return f"({point['computed']:,.0f}, computed)"
    return f"{point['beyond_inputs'] - point['gradients']:,.0f}"


def trainer_table(file: str) -> str:
    """Whole training steps against TRL's."""
    lines = ["| trainer | CPU seconds a step | x SFTTrainer (lowest .. highest step) | peak MB |", "|---|---|---|---|"]
    for name, row in results_of(file)["rows"].items():
        ratio = row["ratio"]
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} .. {ratio['high']:.2f})"
        lines.append(f"| {name} | {row['median']:.1f} | {spread} | {row['peak_mb']:,.0f} |")
    return "\n".join(lines)


def slow_paths() -> str:
    """Targets that need whole rows, or the logits twice, in the run over all targets."""
    found = results_of("speed_cpu_float32_49152_all.json")
    ratio = {name: row["ratio"]["median"] for name, row in found["rows"].items()}
    twice = [ratio[name] for name in SCOPED]
    return (
        f"In float32 at N={found['config']['tokens']:,}, `gem` takes {ratio['gem']:.2f} x the floor ({ratio['gem, compiled']:.2f} "
        f"compiled), a `spread` tail {ratio['asft, tail spread']:.2f} x ({ratio['asft, tail spread, compiled']:.2f}), those "
        f"scopes {min(twice):.2f} to {max(twice):.2f} x, `sft` {ratio['sft']:.2f} x."
    )


SCOPED = ("rho1", "talr", "iw_sft", "token_cleaning", "inverse_likelihood")
"""Targets of sequence or batch scope: they need the logits twice."""
STEPWISE = ("sft", "dft", "p_power", "prior_surprise", "eaft", "label_smoothing", "asft", "distillation", "target_sft")
"""Targets of the short table that run no frozen model."""
SOFT = ("asft", "distillation", "target_sft")
"""Those among them that read a distribution from a cache."""


def slower() -> str:
    """Which targets cost more than naive cross entropy, by multiples of the floor."""
    wide, wider, half = (medians(name) for name in SPEED.values())
    every = medians("speed_cpu_float32_49152_all.json")
    single = [row["name"] for row in target_rows() if row["name"] in every and row["name"] not in (*SCOPED, "gem")]
    live, half_live = ([x for name, x in found.items() if name.endswith("live teacher")] for found in (wide, half))
    one_pass = [name for name in STEPWISE if name not in SOFT]
    lines = [
        "| what | x floor | `sft` there | naive cross entropy there |",
        "|---|---|---|---|",
        spread("float32, V=49,152, N=2,048: 9 targets, no live teacher", [wide[n] for n in STEPWISE], wide),
        spread("float32, V=151,936, N=1,024: the same", [wider[n] for n in STEPWISE], wider),
        spread(f"float32, V=49,152, N=256: {len(single)} targets", [every[n] for n in single], every),
        spread("the same, `gem`", [every["gem"]], every),
        spread("the same, " + ", ".join(f"`{n}`" for n in SCOPED), [every[n] for n in SCOPED], every),
        spread("float32, V=49,152, N=2,048: a live teacher", live, wide),
        spread("bfloat16, V=49,152, N=2,048: 6 targets without a distribution", [half[n] for n in one_pass], half),
        spread("the same, " + ", ".join(f"`{n}`" for n in SOFT) + " from a cache", [half[n] for n in SOFT], half),
        spread("the same, a live teacher", half_live, half),
    ]
    assert len(STEPWISE) == 9 and len(one_pass) == 6
    return "\n".join(lines)


def medians(name: str) -> dict[str, float]:
    """Contender -> its time, a multiple of the floor."""
    return {row: found["ratio"]["median"] for row, found in results_of(name)["rows"].items()}


def spread(what: str, found: list[float], there: dict[str, float]) -> str:
    """A line: least to most, beside what cross entropy takes in the same run."""
    ends = f"{min(found):.2f}" if len(found) == 1 else f"{min(found):.2f} to {max(found):.2f}"
    return f"| {what} | {ends} | {there['sft']:.2f} | {there['naive']:.2f} |"


def speed_note() -> str:
    """What bfloat16 costs, and a live teacher against the five products of a second pass."""
    *float32, bfloat16 = (results_of(name)["rows"] for name in SPEED.values())
    names = ("sft", "naive", "asft", "naive, float32 logits")
    ours, naive, soft, wide = (bfloat16[name]["ratio"]["median"] for name in names)
    live = [row["ratio"]["median"] for name, row in bfloat16.items() if name.endswith("live teacher")]
    five = [
        (name, row["ratio_to_five_products"]["median"])
        for rows in float32
        for name, row in rows.items()
        if "live" in name
    ]
    eager, compiled = ([x for name, x in five if ("compiled" in name) == fused] for fused in (False, True))
    return (
        f"Against five products, with the frozen logits made a second time for the gradient, a live teacher takes "
        f"{min(eager):.2f} to {max(eager):.2f} x, compiled {min(compiled):.2f} to {max(compiled):.2f} x.\n\n"
        f"In bfloat16 the products are fast and what lies between them counts. `sft` takes {ours:.2f} x the floor, naive "
        f"cross entropy {naive:.2f}. `asft`, whose logits are float32, takes {soft:.2f}, naive with float32 logits {wide:.2f}. "
        f"There the loss saves memory and no time. A live teacher costs {min(live):.1f} to {max(live):.1f} x its floor in "
        "bfloat16. On a CPU without such instructions the loss multiplies widened blocks of the head in float32, which is "
        "faster there, and exact."
    )


def proof() -> str:
    """The findings of the proof benchmarks, a line each, and our own target at the ends of the map."""
    noise, prior, distill = (results_of(f"{name}.json") for name in ("noise", "prior", "distill"))
    lines = [f"- Noise: {noise['summary']['finding']}."]
    for base, what in (("none", "has never seen the format"), ("most", "knows most of it")):
        goals = [
            g for g in noise["summary"]["goals"] if (g["base"], g["kind"], g["rate"]) == (base, "random_tokens", 0.4)
        ]
        lines += [
            f"- 40 % random tokens, a base that {what} ({g['untrained']:.0f} % untrained): `sft` {g['sft']:.1f} %, "
            f"`consensus` {g['ours']:.1f} %, best published target `{g['best_published']}` {g['best_published_percent']:.1f} %."
            for g in goals
        ]
    goals = noise["summary"]["goals"]
    near = sum(g["within_a_point_of_best"] for g in goals)
    lines.append(
        f"- `consensus` comes within a point of the best published target, or above it, at {near} of {len(goals)} points."
    )
    lines.append(filtered_rows(noise))
    lines += [line for name, words in OTHER_DATA.items() if (line := other_data(name, words))]
    longer = results_of("distill_long.json")
    lines += [less_data(found) for found in (distill, longer)]
    reached = [name for name, row in prior["summary"]["goals"].items() if row["reached"]]
    ours = prior["summary"]["goals"]["consensus"]
    lines.append(
        f"- A flawed prior is amplified, and the guard mends most of it. {prior['summary']['finding']} (ranges over targets). "
        f"The goal, 95 % of SFT's correction everywhere, is reached by {', '.join(f'`{n}`' for n in reached) or 'none'}; "
        f"`consensus` goes from {ours['corrects_without']:.0%} to {ours['corrects']:.0%} at its worst."
    )
    return "\n".join(lines)


def filtered_rows(noise: dict) -> str:
    """The strongest practice without a target of any kind."""
    cells = noise["summary"]["cells"]
    best = sum(best_of(cell) == FILTERED for cell in cells)
    means = [{name: cell["methods"][name]["accuracy_percent"]["mean"] for name in ("sft", FILTERED)} for cell in cells]
    behind = max(mean["sft"] - mean[FILTERED] for mean in means)
    return (
        f"- An old practice, `sft` without the rows that surprise the base most, is best of all at {best} of {len(cells)} points, "
        f"and at most {behind:.1f} points below `sft`."
    )


def less_data(found: dict) -> str:
    """One setting of the distillation benchmark: the claim, the control, the verdict."""
    full, sft = found["methods"]["distillation"], found["methods"]["sft"]
    need, kl, own = map(needed_words, (full["data_needed"], full["data_needed_for_kl"], sft["data_needed"]))
    met = found["goals"]["accuracy_of_sft_with_0.4_of_the_rows"]["reached"]
    return (
        f"- Less data, {found['config']['steps']} steps: distillation needs {need} of the rows for cross entropy's accuracy on all "
        f"of them (cross entropy itself: {own}), {kl} to be as near to the teacher; with 0.40 of them "
        f"{', '.join(met) or 'no method'} reaches that accuracy."
    )


OTHER_DATA = {
    "noise_scan.json": "SCAN, seen once while `consensus` was designed",
    "noise_math.json": "word problems (MAWPS, ASDiv), not seen while `consensus` was designed",
}


def other_data(name: str, words: str) -> str:
    """40 % random tokens and a base that knows most, on other data; empty if it was not measured."""
    if not (ROOT / "benchmarks/results" / name).is_file():
        return ""
    for g in results_of(name)["summary"]["goals"]:
        if (g["base"], g["kind"], g["rate"]) == ("most", "random_tokens", 0.4):
            best = f"`{g['best_published']}` {g['best_published_percent']:.1f} %"
            return (
                f"- The same on {words}: untrained {g['untrained']:.1f} %, `sft` {g['sft']:.1f} %, `consensus` "
                f"{g['ours']:.1f} %, best published target {best}."
            )
    return ""


def which_target() -> str:
    """The README's table of situations, for a page in ``docs/``: one text, so that the two cannot drift."""
    lines = (ROOT / "docs/README.in").read_text().partition("## Which target?\n\n")[2].splitlines()
    return "\n".join(takewhile(lambda line: line.startswith("|"), lines)).replace("](docs/", "](")


PAGES = {"README.in": "README.md", "targets.in": "docs/targets.md", "performance.in": "docs/performance.md"}
"""Source in ``docs/`` -> the page, from the root."""


def parts() -> dict[str, str]:
    """What stands in place of ``@@NAME@@``."""
    return {
        "TABLE": targets_table(),
        "WHICH": which_target(),
        "PROOF": proof(),
        "REAL": real_table(),
        "SPEED": speed_table(),
        "SPEED_NOTE": speed_note(),
        "MEMORY": memory_table(),
        "SLOWER": slower(),
        "SLOW_PATHS": slow_paths(),
        "TRAINER": trainer_table("trainer_cpu_float32.json"),
        "TRAINER_GEMMA3": trainer_table("trainer_cpu_gemma3.json"),
    }


def render() -> dict[str, str]:
    """Page -> its text as it should be."""
    pages = {page: (ROOT / "docs" / source).read_text() for source, page in PAGES.items()}
    for name, value in parts().items():
        pages = {page: text.replace(f"@@{name}@@", value) for page, text in pages.items()}
    return pages


if __name__ == "__main__":
    for page, text in render().items():
        (ROOT / page).write_text(text)
