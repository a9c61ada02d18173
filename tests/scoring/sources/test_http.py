"""vLLM and SGLang over the wire: exact through the shared suite, and what each fault becomes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtarget.core.errors import ScoringServerError
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.writer import write_cache
from qtarget.scoring.sources.canary import CANARY, TOLERANCE, check_model, check_tokenizer
from qtarget.scoring.sources.engines import EngineChoice
from qtarget.scoring.sources.engines import connect as connect_engine
from qtarget.scoring.sources.http import KEY_VARIABLE, Endpoint, Retries, ServedModel
from qtarget.scoring.sources.local import LocalSource
from qtarget.scoring.sources.sglang import SglangSource
from qtarget.scoring.sources.vllm import VllmSource
from tests.scoring.helpers import VOCAB, provenance, ragged_rows, tiny_model
from tests.scoring.sources.servers import (
    FakeSglang,
    FakeVllm,
    changed,
    half_json,
    reset,
    serving,
    slow,
    status,
    truncated,
)
from tests.scoring.sources.source_suite import SourceSuite

ROW = np.array([5, 9, 3, 60, 0, 7])
KINDS = {"vllm": (FakeVllm, VllmSource), "sglang": (FakeSglang, SglangSource)}


class Waits(list):
    """Stands for ``time.sleep`` and remembers."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def connect(kind: str, url: str, waits: Waits | None = None, *, timeout: float = 20.0, attempts: int = 4, **named):
    retries = Retries(attempts=attempts, sleep=Waits() if waits is None else waits)
    return KINDS[kind][1](Endpoint(url, timeout=timeout, retries=retries), vocab_size=VOCAB, **named)


class HttpSuite(SourceSuite):
    knows_entropy = False
    tolerance = 2e-5

    @pytest.fixture(scope="class")
    def source(self):
        engine = KINDS[self.kind][0](tiny_model())
        engine.max_logprobs = -1
        with serving(engine) as url:
            yield connect(self.kind, url, concurrency=4)


class TestVllm(HttpSuite):
    kind = "vllm"


class TestSglang(HttpSuite):
    kind = "sglang"


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return request.param


@pytest.fixture
def engine(kind):
    return KINDS[kind][0](tiny_model())


@pytest.fixture
def expected():
    (scored,) = LocalSource(tiny_model()).score([ROW], 3)
    return scored


@pytest.mark.parametrize(
    "faults",
    [
        [status(408)],
        [status(429), status(429)],
        [status(503), status(502), status(504)],
        [truncated],
        [half_json],
        [reset, reset],
        [slow(0.6)],
        [status(429), truncated, reset],
    ],
    ids=["408", "429", "503", "truncated", "half", "reset", "slow", "mixed"],
)
def test_what_passes_is_asked_again(engine, kind, expected, faults):
    engine.faults = list(faults)
    waits = Waits()
    with serving(engine) as url:
        (scored,) = connect(kind, url, waits, timeout=0.3 if faults[0].__qualname__.startswith("slow") else 20).score(
            [ROW], 3
        )
    np.testing.assert_allclose(scored.label_log_probs, expected.label_log_probs, atol=1e-5)
    np.testing.assert_array_equal(scored.topk_ids, expected.topk_ids)
    assert not engine.faults
    assert len(waits) == len(faults)
    for n, seconds in enumerate(waits):
        assert 0.75 * 0.5 * 2**n <= seconds <= 1.25 * 0.5 * 2**n


def test_a_servers_own_delay_is_kept_within_bounds(engine, kind):
    engine.faults = [status(429, {"retry-after": "7"}), status(503, {"retry-after": "900"})]
    waits = Waits()
    with serving(engine) as url:
        connect(kind, url, waits).score([ROW], 0)
    assert waits == [7.0, 30.0]


@pytest.mark.parametrize("header", ["²", "Wed, 21 Oct 2037 07:28:00 GMT", "-5", "", "1.5"])
def test_a_delay_that_is_no_number_of_seconds_is_ours(engine, kind, header):
    """A superscript, a date, nonsense: the first wait of our own, spread by a quarter."""
    engine.faults = [status(429, {"retry-after": header})]
    waits = Waits()
    with serving(engine) as url:
        connect(kind, url, waits).score([ROW], 0)
    assert len(waits) == 1
    assert 0.75 * 0.5 <= waits[0] <= 1.25 * 0.5


def test_the_largest_are_kept_in_whatever_order_they_come(engine, kind, expected):
    """Of more log-probs than asked, smallest first."""

    def reversed_tops(answer):
        if kind == "sglang":
            tops = answer["meta_info"]["input_top_logprobs"]
            tops[1:] = [sorted(top, key=lambda entry: entry[0]) for top in tops[1:]]
        else:
            entries = answer["choices"][0]["prompt_logprobs"]
            entries[1:] = [dict(reversed(entry.items())) for entry in entries[1:]]

    asked, engine.post = engine.post, lambda path, body: asked(path, more(body))
    engine.faults = [changed(reversed_tops)]

    def more(body):
        name = "top_logprobs_num" if kind == "sglang" else "prompt_logprobs"
        return body | {name: body[name] + 2}

    with serving(engine) as url:
        (scored,) = connect(kind, url).score([ROW], 3)
    np.testing.assert_array_equal(scored.topk_ids, expected.topk_ids)
    np.testing.assert_allclose(scored.topk_log_probs, expected.topk_log_probs, atol=1e-5)


def test_retries_end(engine, kind):
    engine.faults = [status(503)] * 9
    with (
        serving(engine) as url,
        pytest.raises(ScoringServerError, match=r"failed 4 times.*503 try later.*same command"),
    ):
        connect(kind, url).score([ROW], 0)
    assert len(engine.faults) == 5


def test_nobody_there(kind):
    with serving(FakeVllm(tiny_model())) as url:
        pass
    with pytest.raises(ScoringServerError, match="failed 3 times"):
        connect(kind, url).score([ROW], 0)


def edit_vllm(edit):
    return changed(lambda answer: edit(answer["choices"][0]["prompt_logprobs"]))


def edit_sglang(name, edit):
    return changed(lambda answer: edit(answer["meta_info"][name]))


def put(index, value):
    return lambda entries: entries.__setitem__(index, value)


@pytest.mark.parametrize(
    ("kind", "fault", "words"),
    [
        ("vllm", edit_vllm(lambda e: e.pop()), "5 positions for a row of 6 tokens"),
        ("vllm", edit_vllm(put(2, None)), "None' at position 2.*only position 0 may be null"),
        ("vllm", edit_vllm(lambda e: e[3].pop("60")), "no log-prob of token 60 at position 3"),
        (
            "vllm",
            edit_vllm(lambda e: [e[1].pop(k) for k in [*e[1]][-2:]]),
            "lists . log-probs at position 1.*max-logprobs 3",
        ),
        ("vllm", edit_vllm(put(1, {"9": {"rank": 1}})), "at position 1; expected token ids"),
        ("vllm", changed(lambda answer: answer.update(choices=[])), r"without choices\[0\].prompt_logprobs"),
        (
            "sglang",
            edit_sglang("input_token_logprobs", lambda e: e.pop()),
            "5 positions in meta_info.input_token_logprobs",
        ),
        (
            "sglang",
            edit_sglang("input_token_logprobs", put(2, [None, 3, None])),
            "at position 2.*only position 0 may be",
        ),
        (
            "sglang",
            edit_sglang("input_token_logprobs", put(2, [-1.0, 4, None])),
            "scored token 4 at position 2; the row has 3",
        ),
        ("sglang", edit_sglang("input_top_logprobs", put(4, None)), "None at position 4"),
        (
            "sglang",
            edit_sglang("input_top_logprobs", lambda e: e[4].pop()),
            "lists 2 log-probs at position 4; expected 3",
        ),
        ("sglang", changed(lambda answer: answer.pop("meta_info")), "without meta_info"),
        (
            "sglang",
            changed(lambda answer: answer["meta_info"].pop("input_top_logprobs")),
            "None in meta_info.input_top",
        ),
    ],
)
def test_an_answer_about_something_else_is_refused_at_once(kind, fault, words):
    engine = KINDS[kind][0](tiny_model())
    engine.faults = [fault]
    waits = Waits()
    with serving(engine) as url, pytest.raises(ScoringServerError, match=words):
        connect(kind, url, waits).score([ROW], 3)
    assert waits == []


def test_null_at_position_0_is_what_both_engines_answer(engine, kind):
    seen = []
    engine.faults = [changed(seen.append)]
    with serving(engine) as url:
        connect(kind, url).score([ROW], 2)
    entries = seen[0]["choices"][0]["prompt_logprobs"] if kind == "vllm" else seen[0]["meta_info"]["input_top_logprobs"]
    assert entries[0] is None
    assert len(entries) == len(ROW)


def test_candidates_that_are_not_answered(kind, engine):
    engine.max_logprobs = -1
    if kind == "vllm":
        engine.faults = [edit_vllm(lambda e: [entry.pop("8", None) for entry in e if entry])]
    else:
        engine.faults = [edit_sglang("input_token_ids_logprobs", lambda e: [t.pop() for t in e if t])]
    with serving(engine) as url, pytest.raises(ScoringServerError, match=r"candidates \[8\]"):
        connect(kind, url).score([ROW], 0, [2, 8])


def test_vllms_limit_is_named_with_the_flag_that_lifts_it():
    with serving(FakeVllm(tiny_model())) as url:
        source = connect("vllm", url)
        source.score([ROW], 20)
        with pytest.raises(ScoringServerError, match="max allowed: 20; start vLLM with --max-logprobs 21"):
            source.score([ROW], 21)
        with pytest.raises(ScoringServerError, match="--max-logprobs -1"):
            source.score([ROW], 0, [1])


def test_only_ids_are_sent_one_row_a_request(kind, engine):
    with serving(engine) as url:
        connect(kind, url).score([ROW, ROW[:1], ROW[:3]], 2, positions=[[5], [], [1]])
    sent = [body for path, body in engine.asked if path == engine.scoring_path]
    assert sorted(body["prompt" if kind == "vllm" else "input_ids"] for body in sent) == [[5, 9, 3], ROW.tolist()]
    assert not any("text" in body for body in sent)


def test_the_key_comes_from_the_environment(kind, engine, monkeypatch):
    engine.key = "secret"
    with serving(engine) as url:
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
        with pytest.raises(ScoringServerError, match=KEY_VARIABLE):
            connect(kind, url).score([ROW], 0)
        monkeypatch.setenv(KEY_VARIABLE, "secret")
        connect(kind, url).score([ROW], 0)


def test_the_other_engine_is_recognised():
    with (
        serving(FakeSglang(tiny_model())) as url,
        pytest.raises(ScoringServerError, match=r"version answers 404.*--engine"),
    ):
        connect("vllm", url).describe()
    with serving(FakeVllm(tiny_model())) as url, pytest.raises(ScoringServerError, match=r"404.*--engine"):
        connect("sglang", url).score([ROW], 0)
    with pytest.raises(ScoringServerError, match="no URL of a server"):
        connect("sglang", "127.0.0.1:1").score([ROW], 0)


def test_who_is_there():
    with serving(FakeVllm(tiny_model())) as url:
        assert connect("vllm", url).describe() == ServedModel("tiny", "vllm", "0.20.2", "")
    for old in (False, True):
        engine = FakeSglang(tiny_model())
        engine.old_names = old
        with serving(engine) as url:
            assert connect("sglang", url).describe() == ServedModel("tiny", "sglang", "0.5.3", "float32")


def test_progress_counts_tokens(kind, engine):
    seen = []
    with serving(engine) as url:
        connect(kind, url, on_tokens=seen.append).score([ROW, ROW[:3]], 0)
    assert seen == [5, 2]


def test_a_cache_survives_the_server(kind, engine, tmp_path):
    """The server dies in the third shard; the next run scores what is missing, and the tail is carried along."""
    rows = ragged_rows(12)
    source_rows = provenance(3, engine=kind)
    engine.faults = [lambda *_: False] * 6 + [status(503)] * 40
    with serving(engine) as url:
        with pytest.raises(ScoringServerError, match="503"):
            write_cache(tmp_path, rows, connect(kind, url, concurrency=1), source_rows, shard_rows=4)
        finished = sorted(path.name for path in tmp_path.glob("*.parquet"))
        assert 1 <= len(finished) < 3
        engine.faults, engine.asked = [], []
        write_cache(tmp_path, rows, connect(kind, url), source_rows, shard_rows=4)
        assert len(engine.asked) < 12 - 4 * len(finished) + 1
    cache = ReferenceCache.open(tmp_path)
    assert cache.manifest.engine == kind
    for index in range(len(cache)):
        row = cache.row(index)
        mass = np.exp(row["topk_log_probs"].astype(np.float64)).sum(-1) + np.exp(row["tail_log_mass"])
        np.testing.assert_allclose(mass, 1, atol=1e-4)
        assert "entropy" not in row


def test_a_token_beyond_the_vocabulary_is_refused(kind, engine):
    with serving(engine) as url:
        source = KINDS[kind][1](Endpoint(url), vocab_size=VOCAB - 1)
        with pytest.raises(ScoringServerError, match=r"lists token 60, beyond a vocabulary of 60 rows.*--vocab-size"):
            source.score([np.arange(40)], 20)


def shifted(kind, by):
    """Adds ``by`` to every log-prob: what a server of raw logits says, or worse."""

    def edit(answer):
        if kind == "vllm":
            for entry in answer["choices"][0]["prompt_logprobs"][1:]:
                for value in entry.values():
                    value["logprob"] += by
        else:
            meta = answer["meta_info"]
            tops = [triple for triples in meta.get("input_top_logprobs", [])[1:] for triple in triples]
            for triple in [*meta["input_token_logprobs"][1:], *tops]:
                triple[0] += by

    return changed(edit)


@pytest.mark.parametrize(
    ("by", "top_k", "words"),
    [
        (40.0, 0, r"gives [\d.]+ as a log-prob; expected at most 0.*--logprobs-mode raw_logprobs"),
        (float("nan"), 0, "gives nan as a log-prob"),
        (40.0, 3, "as a log-prob; expected at most 0"),
        (float("inf"), 3, "gives inf as a log-prob"),
        (0.05, VOCAB, r"sum to 1\.05\d*; expected at most 1"),
    ],
)
def test_numbers_that_are_no_log_probs_are_refused(kind, engine, by, top_k, words):
    engine.max_logprobs = -1
    engine.faults = [shifted(kind, by)]
    # near uniform, so that no log-prob is near 0
    engine.model = tiny_model(initializer_range=0.01)
    with serving(engine) as url, pytest.raises(ScoringServerError, match=words):
        connect(kind, url).score([ROW], top_k)


@pytest.mark.parametrize("by", [0.005, -float("inf")])
def test_rounding_and_banned_tokens_are_log_probs(kind, engine, by):
    engine.max_logprobs = -1
    engine.faults = [shifted(kind, by)]
    with serving(engine) as url:
        (scored,) = connect(kind, url).score([ROW], VOCAB)
    assert not np.isnan(scored.topk_log_probs).any()


# -- canary ------------------------------------------------------------------------------------------------------


def characters(extra: str = ""):
    """A tokenizer of one id a character; ``extra`` come first, so every id moves."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["?", *extra, *sorted({c for c in CANARY if c.isascii()} - {"?"})]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


def test_the_canary_accepts_the_same_model_also_in_bfloat16(kind):
    here = LocalSource(tiny_model())
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, TOLERANCE)):
        with serving(KINDS[kind][0](tiny_model().to(dtype), characters())) as url:
            source = connect(kind, url)
            report = check_model(source, check_tokenizer(source, characters()), here, "tiny", tolerance=TOLERANCE)
        assert report.tokens == 63
        assert 0 <= report.mean <= most
        assert report.mean <= report.largest


@torch.no_grad()
def test_the_canary_refuses_another_model(kind):
    trained = tiny_model()
    for parameter in trained.parameters():
        parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    for other in (tiny_model(seed=1), trained):
        with serving(KINDS[kind][0](other, characters())) as url:
            source = connect(kind, url)
            ids = check_tokenizer(source, characters())
            with pytest.raises(ScoringServerError, match=r"is not tiny: .* differ by .* expected at most 0.05"):
                check_model(source, ids, LocalSource(tiny_model()), "tiny", tolerance=TOLERANCE)


def test_the_canary_refuses_another_tokenizer(kind):
    with (
        serving(KINDS[kind][0](tiny_model(), characters(extra="@"))) as url,
        pytest.raises(
            ScoringServerError, match=r"another tokenizer: its token 0 .* \('.'? here\), expected .*'I' here"
        ),
    ):
        check_tokenizer(connect(kind, url), characters())


def heads():
    """Models whose forward pass scales or caps its logits, and what a local source must be told of it."""
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sizes = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.5,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=2.0)).eval()
    scaled = CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.25)).eval()
    return {"softcap": (capped, {"logit_softcap": 2.0}), "scale": (scaled, {"logit_scale": 0.25})}


@pytest.mark.parametrize("head", ["softcap", "scale"])
def test_a_server_whose_model_shapes_its_logits_is_accepted(kind, head):
    model, told = heads()[head]
    with serving(KINDS[kind][0](model, characters())) as url:
        choice = EngineChoice(kind, url)
        found = connect_engine(choice, model, model_id="tiny", tokenizer=characters(), **told)
        assert found.model_id == "tiny"
        with pytest.raises(ScoringServerError, match="is not tiny"):
            connect_engine(choice, model, model_id="tiny", tokenizer=characters())
