"""`qtarget inspect` end to end: numbers against the cache, the page against the JSON, in a real browser."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import chdir
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from qtarget.cli.main import run
from qtarget.data.embedded import base_model_path, load_demonstrations
from qtarget.data.noise import noise_token_mask
from qtarget.report.inspect.document import json_parts
from qtarget.report.inspect.inspection import Inspection, View
from qtarget.report.inspect.marks import roc
from qtarget.report.inspect.page import pack, render_inspection
from qtarget.report.inspect.quantise import quantise
from qtarget.report.inspect.weights import TargetNumbers
from qtarget.report.tokens import ModelNumbers, flatten_rows
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.storage.files import write_text
from tests import ROOT
from tests.report.hostile import HOSTILE

TARGETS = ["sft", "prior_surprise", "asft(kl_weight=0.1)", "label_smoothing"]


DOCS = ROOT / "docs/inspect.md"


def command(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        run([str(a) for a in arguments])
    assert not stopped.value.code


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which the commands of the documentation ran: 80 rows with marked noise, cache, page and JSON."""
    folder = tmp_path_factory.mktemp("inspect")
    clean = [json.dumps(row) for row in load_demonstrations("train")[:80]]
    (folder / "rows.jsonl").write_text("\n".join(clean))
    base = str(base_model_path())
    settings = {
        "model_name_or_path": base, "train_file": "noisy.jsonl", "reference_cache": str(folder / "cache"),
        "output_dir": str(folder / "out"), "report_to": "none", "bf16": False, "use_cpu": True, "max_length": 128,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    block = DOCS.read_text().split("```sh\n")[1].split("```")[0]
    lines = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert [line[0] for line in lines] == ["noise", "score", "inspect"]
    extra = {"noise": ["--tokenizer", base], "inspect": ["--checkpoints", base]}
    with chdir(folder):
        for line in lines:
            wanted = [part.replace(",asft(kl_weight=0.1),", ",asft(kl_weight=0.1),label_smoothing,") for part in line]
            command(*wanted, *extra.get(line[0], []))
    return folder


@pytest.fixture(scope="module")
def numbers(made):
    return json.loads((made / "page.json").read_text())


@pytest.fixture(scope="module")
def cached(made):
    """The cache's columns, all rows one after the other in the order of the data."""
    cache = ReferenceCache.open(made / "cache")
    return [cache.row(i) for i in range(len(cache))]


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_json_holds_the_cached_numbers(numbers, cached):
    assert numbers["targets"] == TARGETS and "whole distribution" in numbers["hidden"]["gem"]
    by_length = {}
    for row in numbers["rows"]:
        view = row["views"][0]
        match = [c for c in cached if len(c["entropy"]) == len(view["entropy"])]
        best = min(match, key=lambda c: np.abs(c["label_log_probs"] - np.array(view["log_prob"])).max())
        step = 2 * np.sqrt(np.abs(best["label_log_probs"]) * 25) / 254 + 0.002  # of the square scale
        assert (np.abs(best["label_log_probs"] - np.array(view["log_prob"])) <= step).all()
        sure, weight = 1 - np.exp(best["label_log_probs"]), view["targets"][1]["weight"]
        np.testing.assert_allclose(weight, sure, atol=0.005)
        assert view["targets"][0]["weight"] == [1.0] * len(sure)
        by_length[row["row"]] = best
    assert len(by_length) == len(numbers["row_numbers"]) == 80


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--reference_cache", "nowhere"], "there is no cache folder .*nowhere; run `qtarget score"),
        (["--teacher_cache", "nowhere"], "there is no cache folder .*nowhere"),
        (["--reference_model_name_or_path", "another"], "made with model .*, the config says 'another'; score again"),
    ],
)
def test_a_cache_that_is_not_the_one_meant_is_refused(made, changes, words, capsys):
    """Never the model itself instead, and never another model's numbers under this one's name."""
    with pytest.raises(SystemExit) as stopped, chdir(made):
        run(["inspect", "run.yaml", "--targets", "sft", "--output", "other.html", *changes])
    assert stopped.value.code == 2
    assert re.search(words, " ".join(capsys.readouterr().err.split()))


def test_summary_is_exact(numbers, cached):
    log_probs = np.concatenate([c["label_log_probs"] for c in cached]).astype(np.float64)
    assert len(log_probs) == numbers["views"][0]["tokens"]
    found = {s["target"]: s for s in numbers["views"][0]["summary"]}
    p = np.exp(log_probs)
    expected = {"sft": np.ones_like(p), "prior_surprise": 1 - p, "asft(kl_weight=0.1)": p}
    for name, a in expected.items():
        assert found[name]["loss_kept"] == pytest.approx((a * log_probs).sum() / log_probs.sum(), rel=1e-4)
        assert found[name]["moved_mean"] == pytest.approx((a * (1 - p)).mean(), rel=1e-4)
        assert found[name]["effective_sample_share"] == pytest.approx(a.sum() ** 2 / len(a) / (a**2).sum(), rel=1e-4)
    deciles = numbers["views"][0]["deciles"]
    order = np.sort(p)
    parts = np.array_split(order, 10)
    assert sum(deciles["counts"]) == len(p) and max(deciles["counts"]) - min(deciles["counts"]) <= 1
    share = [(1 - part).sum() / (1 - p).sum() for part in parts]
    np.testing.assert_allclose(deciles["targets"][1]["weight_share"], share, atol=0.01)


def test_marks_are_those_of_the_noise(made, numbers):
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    rows = [json.loads(line) for line in (made / "noisy.jsonl").read_text().splitlines()]
    for row in numbers["rows"]:
        source = rows[row["row"]]
        encoded = tokenizer(source["completion"], return_offsets_mapping=True, add_special_tokens=False)
        trained = [row["ids"][t] for t in row["trained"]]
        if trained[: len(encoded["input_ids"])] == encoded["input_ids"]:
            expected = noise_token_mask(encoded["offset_mapping"], source["noise_spans"])
            assert [bool(m) for m in row["marked"]][: len(expected)] == expected
    assert numbers["views"][0]["marks"]["marked_rows"] == sum(bool(r["noise_spans"]) for r in rows)
    by_token = {s["score"]: s["auc"] for s in numbers["views"][0]["marks"]["by_token"]}
    assert by_token["surprise, -log p"] > 0.5


def test_a_checkpoint_that_is_the_base_has_its_numbers(numbers):
    for row in numbers["rows"][:10]:
        base, later = row["views"]
        np.testing.assert_allclose(base["log_prob"], later["log_prob"], atol=0.2)
        assert base["rank"] == later["rank"]


def test_more_rows_than_asked_for_are_sampled_and_the_page_says_so(made, capsys):
    command(
        "inspect", made / "run.yaml", "--rows", "7", "--sample_seed", "3", "--mark", "skill=add",
        "--output", made / "few.html", "--json", made / "few.json",
    )  # fmt: skip
    few = json.loads((made / "few.json").read_text())
    assert len(few["rows"]) == 7 and few["row_numbers"] == sorted(few["row_numbers"])
    about = dict(few["about"])
    assert about["rows"] == "7 of 80 rows, sampled uniformly without replacement, seed 3"
    rows = [json.loads(line) for line in (made / "noisy.jsonl").read_text().splitlines()]
    assert few["row_marked"] == [rows[i]["skill"] == "add" for i in few["row_numbers"]]


@pytest.mark.parametrize("cached", [True, False])
def test_a_row_that_trains_on_nothing_is_shown_all_masked(cached, tmp_path, open_page, capsys):
    """It is in no cache, and it is what the audit warns of: the page must not stop at it."""
    rows = [{"prompt": "one", "completion": " two"}, {"prompt": "word " * 40, "completion": " lost"},
            {"prompt": "", "completion": " three four"}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": str(base_model_path()), "train_file": "rows.jsonl", "output_dir": str(tmp_path / "out"),
        "report_to": "none", "bf16": False, "use_cpu": True, "max_length": 16,
    }  # fmt: skip
    if cached:
        settings["reference_cache"] = str(tmp_path / "cache")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    if cached:
        command("score", tmp_path / "run.yaml", "--top_k", "3")
    command("inspect", tmp_path / "run.yaml", "--output", tmp_path / "page.html", "--json", tmp_path / "page.json")
    found = json.loads((tmp_path / "page.json").read_text())
    assert [bool(row["trained"]) for row in found["rows"]] == [True, False, True]
    assert [value is None for value in found["views"][0]["row_nll"]] == [False, True, False]
    assert [f["rows"] for f in found["audit"]["findings"] if f["check"] == "cut_off"] == [[1]]
    assert not any(f["check"] == "cache_coverage" for f in found["audit"]["findings"])
    page = open_page(tmp_path / "page.html", fragment="#row=2")
    page.wait_for_selector(".row.linked .tok")
    assert page.locator(".row.linked .tok:not(.masked)").count() == 0
    if cached:  # a row that the cache lacks is called by its number in the data
        rows[2]["completion"] = " five"
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(SystemExit):
            run(["inspect", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "page.html")])
        assert "1 of 2 rows are not in the cache" in (said := " ".join(capsys.readouterr().err.split()))
        assert "rows 3;" in said


@pytest.mark.nightly
def test_of_100_000_rows_a_sample_is_shown_and_it_says_so(tmp_path, open_page, capsys):
    """Five thousand rows of a hundred thousand, evenly: stated in page and JSON, the same for the same seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    size: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(f'{{"prompt": "a", "completion": " {i}"}}\n' for i in range(100_000))
    settings = {
        "model_name_or_path": "model", "train_file": "rows.jsonl", "output_dir": str(tmp_path / "out"),
        "report_to": "none", "bf16": False, "use_cpu": True,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))

    def inspected(name: str, *options: str) -> dict:
        page = ["--output", tmp_path / f"{name}.html", "--json", tmp_path / f"{name}.json"]
        command("inspect", tmp_path / "run.yaml", *page, *options)
        return json.loads((tmp_path / f"{name}.json").read_text())

    found = inspected("default")
    numbers = found["row_numbers"]
    assert len(numbers) == len(set(numbers)) == 5000 and numbers == sorted(numbers)
    assert np.histogram(numbers, 10, (0, 100_000))[0] == pytest.approx(np.full(10, 500), abs=5 * 21.2)  # binomial
    stated = "5,000 of 100,000 rows, sampled uniformly without replacement, seed 0"
    assert dict(found["about"])["rows"] == stated and "not run on a sample" in dict(found["about"])["audit"]
    assert found["audit"] is None and found["views"][0]["tokens"] == sum(found["row_trained"])
    for row in found["rows"][::500]:  # a row's number is that of the data
        assert "".join(row["texts"]).startswith(f"a {row['row']}")
    page = open_page(tmp_path / "default.html")
    page.wait_for_selector("html[data-ready]")
    page.click("#tab-about")
    assert stated in page.locator("#about").inner_text()
    few = [inspected(f"few{i}", "--rows", "20", "--sample_seed", seed) for i, seed in enumerate("778")]
    assert few[0] == few[1] and few[0]["row_numbers"] != few[2]["row_numbers"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--mark", "nothing=1", "no row has a value"),
        ("--targets", "gem", "no target can be shown"),
        ("--group_by", "nowhere", "no such column"),
    ],
)
def test_what_cannot_be_done_is_said(made, capsys, option, value, message):
    with pytest.raises(SystemExit) as stopped:
        run(["inspect", str(made / "run.yaml"), "--rows", "5", option, value, "--output", str(made / "x.html")])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_roc_against_all_pairs():
    rng = np.random.default_rng(0)
    scores, marked = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.3
    high, low = scores[marked][:, None], scores[~marked][None]
    found = roc(scores, marked)
    assert found["auc"] == pytest.approx(((high > low) + 0.5 * (high == low)).mean())
    curve = np.array(found["curve"])
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(curve))
    assert area == pytest.approx(found["auc"], abs=1e-3)


@pytest.mark.parametrize(
    "numbers", [np.linspace(-30, 0, 999), np.linspace(0, 2, 999), np.linspace(-1, 3, 999), np.zeros(5)]
)
def test_rounding_error_is_at_most_half_a_level(numbers):
    codes = quantise(numbers)
    gaps = np.abs(np.diff(codes.values)).max()
    assert np.abs(codes.decoded - numbers).max() <= gaps / 2 + 1e-4
    assert codes.decoded[np.argmin(np.abs(numbers))] == pytest.approx(0, abs=0.02)


# -- the page --------------------------------------------------------------------------------------------------------


def shown(value: float) -> str:
    """As ``QT.number`` writes it."""
    if value == 0 or float(value).is_integer():
        return f"{value:,.0f}"
    if 1e-3 <= abs(value) < 1e6:
        return str(float(f"{value:.4g}")).removesuffix(".0")
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:.2e}").replace("e+", "e+")


@pytest.fixture
def page(made, open_page):
    page = open_page(made / "page.html")
    page.wait_for_selector("html[data-ready]")
    page.wait_for_selector(".tok[data-j]")
    return page


def token_of(page, numbers, place: int = 2):
    """The first card's token number ``place`` among the trained, and its row in the JSON."""
    card = page.locator(".row").first
    number = int(card.locator("a").first.inner_text().removeprefix("row ")) - 1  # a page counts from 1
    row = next(r for r in numbers["rows"] if r["row"] == number)
    return card.locator(".tok[data-j]").nth(place), row


def test_rows_are_sorted_and_tokens_and_masks_are_those_of_the_json(page, numbers):
    means = dict(zip(numbers["row_numbers"], numbers["views"][0]["row_nll"]))
    order = [int(t.removeprefix("row ")) - 1 for t in page.locator(".row .facts a").all_inner_texts()]
    assert order == sorted(means, key=lambda n: -means[n])[: len(order)]
    _, row = token_of(page, numbers)
    card = page.locator(".row").first
    assert card.locator(".tok").count() == len(row["ids"])
    masked = card.locator(".tok").evaluate_all("all => all.map((t, i) => t.classList.contains('masked') ? -1 : i)")
    assert [i for i in masked if i >= 0] == row["trained"]
    assert card.locator(".tok.noise").count() in (sum(row["marked"]), 0)
    page.select_option("#sort", "order")
    assert page.locator(".row").first.get_attribute("aria-label") == "row 1"


def test_hover_shows_the_numbers_and_alternatives_of_the_json(page, numbers):
    place = 2
    token, row = token_of(page, numbers, place)
    view = row["views"][0]
    page.select_option("#target", str(TARGETS.index("label_smoothing")))
    token.hover()
    page.wait_for_selector("#qt-tip .bars")
    text = page.locator("#qt-tip").inner_text()
    assert f"log p {shown(view['log_prob'][place])} nats" in text
    assert f"entropy {shown(view['entropy'][place])} nats" in text
    table = page.locator("#qt-tip tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.children].map(c => c.textContent))"
    )
    for cells, name, target in zip(table, TARGETS, view["targets"], strict=True):
        assert cells[:3] == [name, shown(target["weight"][place]), shown(target["moved"][place])]
    names = page.locator("#qt-tip .bars .name").all_inner_texts()
    texts = dict(zip((i for r in numbers["rows"] for i in r["ids"]), (t for r in numbers["rows"] for t in r["texts"])))
    listed = view["alternatives"]["tokens"][place]
    for name, (token_id, _) in zip(names, listed):
        assert token_id not in texts or name == texts[token_id].replace("\n", "↵\n")
    bars = page.locator("#qt-tip .bars .hold.p b").all_inner_texts()
    observed = row["ids"][row["trained"][place]]
    for bar, (token_id, p) in zip(bars, listed):
        assert token_id == observed or bar == shown(p if p >= 5e-4 else 0)
    q = page.locator("#qt-tip .bars .hold.q b").all_inner_texts()
    stored = view["alternatives"]["q"][TARGETS.index("label_smoothing")]
    if stored is not None:
        assert q[names.index(texts[observed])] == shown(stored[place][-1])
    assert sum(map(float, bars)) == pytest.approx(1, abs=0.02) and sum(map(float, q)) == pytest.approx(1, abs=0.02)


def test_switching_target_and_quantity_changes_the_colours(page, numbers):
    token, row = token_of(page, numbers)
    ground = "t => t.style.backgroundColor"
    colours = {}
    for quantity in ("surprise", "entropy", "gradient", "rank", "weight"):
        page.select_option("#quantity", quantity)
        colours[quantity] = token.evaluate(ground)
    page.select_option("#target", "0")
    sft = token.evaluate(ground)
    assert sft == "rgb(0, 34, 78)"  # weight 1 of 1: the dark end in light
    page.select_option("#target", "2")
    weight = row["views"][0]["targets"][2]["weight"][2]
    assert (token.evaluate(ground) != sft) == (weight < 0.99)
    assert "label weight" in page.locator("#legend").inner_text()
    page.click("#qt-theme")
    page.select_option("#target", "0")
    assert token.evaluate(ground) == "rgb(254, 232, 56)"


def test_keyboard_reaches_every_token(page, numbers):
    page.locator(".row").first.focus()
    page.keyboard.press("ArrowRight")
    first = page.evaluate("document.activeElement.dataset.j")
    page.wait_for_selector("#qt-tip:not([hidden])")
    page.keyboard.press("ArrowRight")
    assert int(page.evaluate("document.activeElement.dataset.j")) == int(first) + 1
    page.keyboard.press("Escape")
    assert page.locator("#qt-tip").is_hidden()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement === document.querySelectorAll('.row')[1]")
    for key in ["ArrowDown"] * 9 + ["ArrowUp"] * 9:  # what has the focus is not below the bar that stays at the top
        page.keyboard.press(key)
        assert page.evaluate(
            "document.activeElement.getBoundingClientRect().top >= document.querySelector('.bar').getBoundingClientRect().bottom"
        ), key
    page.locator("#tab-tokens").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#distribution").is_visible() and page.locator("#distribution svg").count() >= 5


def test_link_search_and_other_tabs(made, open_page, numbers):
    page = open_page(made / "page.html", fragment="#row=41", scheme="dark")
    page.wait_for_selector(".row.linked")
    assert page.locator(".row.linked .facts a").inner_text() == "row 41"
    word = next(t for t in numbers["rows"][5]["texts"] if len(t.strip()) > 3).strip()
    page.fill("#search", word)
    hits = sum(word.lower() in "".join(r["texts"]).lower() for r in numbers["rows"])
    page.wait_for_function(f"document.getElementById('count').textContent.startsWith('{hits} of')")
    page.click("#tab-distribution")
    cells = page.locator("#distribution table").first.locator("tbody tr").first.locator("td").all_inner_texts()
    assert cells[0] == "1" and cells[4] == "100 %"
    first = page.locator("#distribution figure").evaluate_all(
        "figures => figures.map(f => f.querySelector('.qt-note')?.innerText.split('\\u2003')[0].trim())"
    )  # one colour a target, in all charts
    assert first == [None, "sft", "sft", "surprise", "sft"]
    page.click("#tab-marks")
    auc = {s["score"]: s["auc"] for s in numbers["views"][0]["marks"]["by_row"]}
    shown_auc = page.locator("#marks table").first.locator("tbody tr").first.locator("td").first.inner_text()
    assert shown_auc == shown(auc["mean surprise, -log p"])
    marks = numbers["views"][0]["marks"]
    curves = [page.locator("#marks figure").nth(i).locator("polyline").count() for i in range(2)]
    assert curves == [len(marks["by_row"]) + 1, len(marks["by_token"]) + 1]  # every score, and chance
    page.click("#tab-audit")
    assert page.locator("#audit .finding").count() == len(numbers["audit"]["findings"])
    page.click("#tab-about")
    assert "rounded to 255 levels" in page.locator("#about").inner_text()
    page.click("#tab-tokens")
    page.select_option("#view", "1")
    page.wait_for_timeout(100)


# -- text that wants to be more ----------------------------------------------------------------------------------------


def by_hand(texts: dict[int, str], rows: int = 3, length: int = 40) -> Inspection:
    """Made-up numbers of rows that hold every text."""
    rng = np.random.default_rng(0)
    ids = [[*texts, *rng.integers(0, len(texts), length).tolist()] for _ in range(rows)]
    tokens = flatten_rows([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids])
    n = len(tokens.labels)
    p = rng.random(n).astype(np.float32).clip(0.01)
    listed = np.tile(np.arange(5), (n, 1)) % len(texts)
    logs = np.tile(np.log(np.array([0.3, 0.2, 0.1, 0.05, 0.01], np.float32)), (n, 1))
    live = ModelNumbers("<b>m</b>", 99, np.log(p), p, listed, logs, np.full(n, np.log(0.34), np.float32))
    a = rng.random(n).astype(np.float32)
    target = TargetNumbers("<i>t</i>", a, 0 * a, a * (1 - p))
    groups = ("source", [HOSTILE[i % len(HOSTILE)] for i in range(rows)])
    return Inspection(HOSTILE[1], [("<u>", HOSTILE[0])], tokens, [View(live, [target])], {}, texts, groups)


def test_hostile_tokens_are_shown_and_do_nothing(tmp_path, open_page):
    texts = dict(enumerate([*HOSTILE, "x" * 2**20, "<script>" * 200, ""]))
    found = by_hand(texts)
    document, packer = pack(found)
    html = render_inspection(document)
    assert len(html) < 300_000 and "<script>document" not in html
    write_text(tmp_path / "page.html", html)
    again = json.loads("".join(json_parts(found, document, packer)))
    assert again["rows"][0]["texts"][1] == HOSTILE[1]
    page = open_page(tmp_path / "page.html")
    page.wait_for_selector("html[data-ready]")
    tokens = page.locator(".row").first.locator(".tok")
    seen = tokens.all_inner_texts()
    assert seen[:5] == HOSTILE[:5]
    assert seen[6] == "aU+202EbU+200BcU+2066dU+FEFFU+00ADU+0000U+001BU+2028U+2029"
    assert seen[7] == "U+D800 alone U+DC00"
    assert "1,048,326 characters" in seen[len(HOSTILE)] and len(seen[len(HOSTILE)]) < 400
    assert seen[len(HOSTILE) + 2] == "empty"
    tokens.nth(3).hover()
    page.wait_for_selector("#qt-tip .bars")
    assert page.evaluate("document.scripts.length") == 2 and "owned" not in page.title()[:5]
    for tab in ("distribution", "about"):
        page.click(f"#tab-{tab}")
    assert page.locator("main img, main b script, #about u").count() == 0


@pytest.mark.parametrize("budget", [30000, 60000, 400000])
def test_a_page_keeps_to_its_budget_and_says_what_it_left_out(budget, tmp_path, open_page):
    found = by_hand({i: f" w{i}" for i in range(9)}, rows=60, length=200)
    document, packer = pack(found, budget)
    assert len(json.dumps(document)) <= budget
    kept, detailed = document["tokens"]["rows"], document["alternatives"]["rows"]
    assert f"{len(kept)} of 60 rows" in document["notes"][1]
    assert set(detailed) <= set(kept)
    again = json.loads("".join(json_parts(found, document, packer)))
    assert [r["row"] for r in again["rows"]] == kept
    write_text(tmp_path / "page.html", render_inspection(document))
    page = open_page(tmp_path / "page.html")
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#count").inner_text() == f"{len(kept)} of 60 rows"


def test_where_not_all_rows_fit_half_of_those_shown_have_alternatives():
    """Rows without them explain little; before all rows are left out, so are the alternatives of some."""
    found = by_hand({i: f" w{i}" for i in range(99)}, rows=200, length=200)
    live = found.views[0].live
    assert live.topk_log_probs is not None and live.topk_ids is not None
    rng = np.random.default_rng(1)
    listed = -np.sort(-rng.dirichlet(np.ones(6), len(live.entropy))[:, :5])
    live.topk_log_probs[:], live.topk_ids[:] = np.log(listed), rng.integers(0, 99, live.topk_ids.shape)
    for budget in (150_000, 300_000):
        document, _ = pack(found, budget)
        kept, detailed = len(document["tokens"]["rows"]), len(document["alternatives"]["rows"])
        assert kept < 200 and 0.4 <= detailed / kept <= 0.75
        assert 0.85 * budget < len(json.dumps(document)) <= budget


def test_scripts_and_styles_of_the_page_end_where_they_should():
    assets = ROOT / "src/qtarget/report/assets"
    for path in assets.iterdir():
        text = path.read_text()
        assert "</" not in text and "innerHTML" not in re.sub(r"//.*|/\*.*?\*/", "", text) and "<!--" not in text, path


MARKED = json.loads((ROOT / "benchmarks/results/marked_smollm2.json").read_text())["data"]


@pytest.mark.parametrize("name", MARKED)
def test_the_committed_pages_open(name, open_page):
    page = open_page(DOCS.parent / f"inspect/{name}.html")
    page.wait_for_selector(".row .tok", timeout=60_000)
    page.click("#tab-marks")
    cells = page.locator("#marks table").first.locator("tbody tr").first.locator("td").first.inner_text()
    assert cells == shown(MARKED[name]["by_row"]["mean surprise"][0])


def test_the_table_of_areas_is_the_result_file():
    data = json.loads((DOCS.parents[1] / "benchmarks/results/inspect_auc.json").read_text())["data"]
    views = [one["views"][0] for one in data.values()]
    text = DOCS.read_text()
    lines_of_it = text[text.index("| AUC") :].split("\n\n")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines_of_it]
    assert [cell.strip("`") for cell in table[0][1:]] == list(data)
    lines = {first: rest for first, *rest in table[2:]}
    counts = [f"{one['rows']:,} ({view['marked_rows']:,})" for one, view in zip(data.values(), views, strict=True)]
    assert lines.pop("rows (marked)") == counts
    assert lines.pop("base's mean surprise, nats a token") == [f"{view['nll_mean']:.2f}" for view in views]
    for line, cells in lines.items():
        kind, score = line.split(": ", 1)
        for cell, view in zip(cells, views, strict=True):
            area, bounds = view[f"by_{kind}"][score]
            assert cell == f"{area:.2f}" + (f" ({bounds[0]:.2f} .. {bounds[1]:.2f})" if bounds else "")
    assert len(lines) == sum(len(views[0][part]) for part in ("by_row", "by_token"))


def test_the_revision_of_the_config_is_the_one_that_is_looked_at(tmp_path, monkeypatch):
    """Two revisions in a local hub cache, with other weights and other tokens: the page shows the one that training takes."""
    import huggingface_hub.constants
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--owner--name"
    for seed, revision in enumerate(("main", "other")):
        snapshot = repository / "snapshots" / f"{seed:040d}"
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(base_model_path())
        tokenizer.add_tokens(["small"] if seed else [])
        size = len(tokenizer)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
            )
        ).save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(f"{seed:040d}")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "A small", "completion": " small small dog"}) + "\n")
    settings = {
        "model_name_or_path": "owner/name", "train_file": "rows.jsonl", "output_dir": str(tmp_path / "out"),
        "report_to": "none", "bf16": False, "use_cpu": True,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    page = ["--output", tmp_path / "page.html", "--json", tmp_path / "page.json", "--no-audit"]
    for seed, revision in enumerate(("main", "other")):
        command("inspect", tmp_path / "run.yaml", "--model_revision", revision, *page)
        document = json.loads((tmp_path / "page.json").read_text())
        (row,) = document["rows"]
        assert row["texts"].count("small") == (3 if seed else 0)
        model = AutoModelForCausalLM.from_pretrained(repository / "snapshots" / f"{seed:040d}")
        with torch.no_grad():
            log_probs = model(torch.tensor([row["ids"]])).logits[0, :-1].log_softmax(-1)
        expected = [log_probs[place - 1, row["ids"][place]].item() for place in row["trained"]]
        assert document["views"][0]["nll_mean"] == pytest.approx(-np.mean(expected), abs=1e-4)
