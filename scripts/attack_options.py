"""Tables: broken YAML, keys of a config, damages of a cache, options of every verb."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attack_models import holding

Damage = Callable[[Path], None]
SHARD_ENDINGS = {".npz", ".safetensors", ".arrow", ".parquet"}
YAML: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "a list": b"- a\n- b\n",
    "a string": b"hello\n",
    "open bracket": b"target: [sft\n",
    "tabs": b"target:\n\t- sft\n",
    "key twice": b"target: sft\ntarget: dft\n",
    "binary": bytes(range(256)),
    "UTF-16": "target: sft\n".encode("utf-16"),
    "tag of Python": b"target: !!python/object/apply:os.system ['true']\n",
    "nested 100,000 deep": b"target: " + b"[" * 100_000 + b"]" * 100_000,
    "aliases of aliases": b"target_kwargs:\n  a0: &a0 [x, x]\n"
    + b"".join(b"  a%d: &a%d [*a%d, *a%d, *a%d]\n" % (i, i, i - 1, i - 1, i - 1) for i in range(1, 40))
    + b"max_steps: *a39\n",
    "alias inside itself": b"target_kwargs: &a\n  b: *a\n",
    "integer of 5,000 digits": b"max_steps: " + b"9" * 5000 + b"\n",
    "unknown key": b"model_name_or_path: m\nlerning_rate: 1e-4\n",
    "no model": b"train_file: rows.jsonl\n",
    "keys that are no text": b"? [1, 2]\n: 3\n",
}
NUMBERS = {
    "learning_rate": "nan -1 inf abc 1e400 [1] {{}}",
    "per_device_train_batch_size": "0 -1 1.5 many 99999999999999999999",
    "max_steps": "nan 1.5 abc -7",
    "num_train_epochs": "nan -3 inf abc",
    "weight_decay": "nan -1 abc",
    "max_grad_norm": "nan -1 abc",
    "gradient_accumulation_steps": "0 -1 1.5",
    "max_length": "0 -5 1.5 abc",
    "logging_steps": "nan -1 abc",
    "warmup_steps": "nan -1",
    "seed": "-1 1.5 abc 99999999999999999999999",
    "adam_beta1": "nan 1.5 -1",
    "adam_epsilon": "nan -1",
    "dataloader_num_workers": "-1 1.5",
    "prompt_weight": "nan -1 inf abc",
    "heatmap_rows": "-1 1.5",
    "teacher_top_k": "0 -1 1.5",
    "save_total_limit": "-1 abc",
}
WORDS = {
    "target": "nonsense 5 [sft] qtarget.nothing:there no.such.module:Target {good}/rows.jsonl",
    "target_kwargs": '{{"eta":1}} [1] nonsense {{"kl_weight":"NaN"}}',
    "guard": "maybe 7",
    "optim": "nonsense 5",
    "lr_scheduler_type": "nonsense 5",
    "dtype": "nonsense float7",
    "attn_implementation": "nonsense",
    "vocab_padding": "nonsense",
    "weights_scale": "nonsense",
    "unplaced_spans": "nonsense",
    "loss_backend": "nonsense",
    "limits": "nonsense 5 [rows] {{rows:1}} {{nonsense:1}} {{rows:0}}",
    "data_format": "nonsense",
    "null_content": "nonsense",
    "roles": "nonsense [1]",
    "tools_file": "{good}/missing {good}/rows.jsonl {good}",
    "packing": "maybe 7",
    "chat_template_path": "{good}/missing {good} {model}/model.safetensors",
    "validation_file": "{good}/missing {good} {model}/model.safetensors",
    "reference_cache": "{good}/rows.jsonl",
    "teacher_cache": "{good}/rows.jsonl",
    "teacher": "nonsense ftp://x {good}/missing",
    "reference_model_name_or_path": "{good}/missing {good}/rows.jsonl {good}",
    "teacher_model_name_or_path": "{good}/missing {good}/rows.jsonl {good}",
    "cache_verify_key": "{good}/missing {good}",
    "output_dir": "{model} {cache} {good}/rows.jsonl {good} /proc/nothing",
    "resume_from_checkpoint": "{good}/missing {model} {good}/rows.jsonl",
    "resume": "maybe 7",
    "eval_strategy": "nonsense steps",
    "save_strategy": "nonsense",
    "report_to": "nonsense",
    "dataset_name": "{good}/missing nonsense/nothing",
    "unknown_key": "5",
    "lora_r": "-1 abc",
}
KEYS = [(key, value) for table in (NUMBERS, WORDS) for key, values in table.items() for value in values.split()] + [
    ("+", words)
    for words in (
        "stray",
        "--target asft --reference {good}/missing",
        "--target forward_kl",
        "--target asft --target_kwargs.kl_weight nan",
        '--target asft --target_kwargs {{"kl_weight":-1} --reference_cache {cache}'.replace("1}", "1}}"),
        "--target asft --reference_cache {other_cache}",
        "--target forward_kl --teacher_cache {other_cache}",
        "--target eaft --target_kwargs {{top_k:0}}",
        "--target idft --target_kwargs {{beta:0}}",
        "--target label_smoothing --target_kwargs {{smoothing:2}}",
        "--target p_power --target_kwargs {{alpha:.nan}}",
        "--train_file {good}/rows.jsonl --dataset_name x",
        "--max_steps 0",
        "--target asft --reference_cache {good}/missing",
        "--target asft --reference_cache {model}",
        "--target forward_kl --teacher_cache {good}/missing",
        "--target forward_kl --teacher_cache {model}",
        "--target forward_kl --teacher http://",
        "--target forward_kl --teacher http://127.0.0.1:9",
        "--use_peft true --lora_target_modules nonsense",
    )
]


def manifest(**keys: Any) -> Damage:
    """A manifest that says something else."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(content | keys))

    return damage


def shard(change: Callable[[bytes], bytes | None]) -> Damage:
    """Its first shard is other bytes; None: gone."""

    def damage(folder: Path) -> None:
        first = sorted(path for path in folder.rglob("*.*") if path.suffix in SHARD_ENDINGS)[0]
        content = change(first.read_bytes())
        first.unlink()
        if content is not None:
            first.write_bytes(content)

    return damage


CACHE_DAMAGES: dict[str, Damage] = {
    "manifest missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest empty": holding("manifest.json", b""),
    "manifest broken": holding("manifest.json", b'{"version": 1'),
    "manifest a list": holding("manifest.json", b"[]"),
    "manifest nested 100,000 deep": holding("manifest.json", b"[" * 100_000),
    "manifest of 5,000 digits": holding("manifest.json", b'{"version": ' + b"9" * 5000 + b"}"),
    "manifest UTF-16": holding("manifest.json", "{}".encode("utf-16")),
    "manifest without keys": holding("manifest.json", b"{}"),
    "negative top_k": manifest(top_k=-1),
    "top_k that disagrees": manifest(top_k=9),
    "vocabulary of text": manifest(vocab_size="many"),
    "unknown version": manifest(version=999, format_version=999, schema_version=999),
    "shards a string": manifest(shards="none"),
    "shard missing": shard(lambda content: None),
    "shard empty": shard(lambda content: b""),
    "shard cut off": shard(lambda content: content[: len(content) // 2]),
    "shard with a bit flipped": shard(lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]),
    "shard of zeros": shard(lambda content: bytes(len(content))),
}
OPTIONS = """
nonsense
train
score
inspect
convert
noise
lens
report
evaluate
serve
cache
cache nonsense
bench
bench nonsense
train {rows}
train {model}
train {model}/model.safetensors
train {config} --help=7x
score {config} --output {out} --top-k -1
score {config} --output {out} --top-k many
score {config} --output {out} --top-k 99999999
score {config} --output {out} --top-k 4 --sampled 4
score {config} --output {out} --tail-policy nonsense
score {config} --output {out} --log-probs-dtype float8
score {config} --output {out} --shard-rows 0
score {config} --output {out} --role nonsense
score {config} --output {out} --role teacher
score {config} --output {out} --engine nonsense
score {config} --output {out} --engine mosec
score {config} --output {out} --engine mosec --url http://127.0.0.1:9
score {config} --output {out} --engine vllm --url http://127.0.0.1:9
score {config} --output {out} --engine sglang --url http://127.0.0.1:9
score {config} --output {out} --engine mosec --url nonsense
score {config} --output {out} --engine mosec --url file:///etc/passwd
score {config} --output {out} --engine mosec --url http://[::1
score {config} --output {out} --url http://127.0.0.1:9
score {config} --output {out} --known {good}/missing
score {config} --output {out} --known {rows}
score {config} --output {out} --known {model}
score {config} --output {out} --sign {good}/missing
score {config} --output {out} --sign {good}
score {config} --output {out} --workers 0
score {config} --output {model}
score {config} --output {rows}
score {config} --output {good}
score {config} --output {cache} --top-k 9
score {config} --role sideways
inspect {config} --output {out} --targets nonsense
inspect {config} --output {out} --targets sft,
inspect {config} --output {out} --targets target_sft(eta=nan)
inspect {config} --output {out} --targets target_sft(
inspect {config} --output {out} --targets eaft(alpha=__import__('os'))
inspect {config} --output {out} --rows 0
inspect {config} --output {out} --checkpoints {good}/missing
inspect {config} --output {out} --checkpoints {rows}
inspect {config} --output {out} --mark nonsense
inspect {config} --output {out} --mark nothing=1
inspect {config} --output {out} --group-by nothing
inspect {config} --output {out} --page-megabytes nan
inspect {config} --output {out} --page-megabytes -1
inspect {config} --output {out} --split nonsense
inspect {config} --output {out} --split validation
inspect {config} --output {rows}
inspect {config} --output {model}
inspect {config} --output {model}/page.html
inspect {config} --output /proc/nothing/page.html
audit-data {good}/missing
audit-data {good}
audit-data {model}/model.safetensors
audit-data {config} --split nonsense
audit-data {config} --split validation
audit-data {config} --json {rows}
audit-data {config} --json {model}
audit-data {config} --json /proc/nothing/x.json
convert {rows} {rows}
convert {rows} {rows} --overwrite
convert {rows} {model}
convert {rows} {out} --format nonsense
convert {rows} {out} --format alpaca
convert {rows} {out} --format sharegpt
convert {rows} {out} --tools {good}/missing
convert {rows} {out} --tools {rows}
convert {rows} {out} --null-content nonsense
convert {rows} {out} --limits nonsense
convert {rows} {out} --limits {{rows:0}}
convert {rows} {out} --limits {{rows:
convert {rows} {out} --tools /dev/zero
convert {rows} {out} --role nonsense
convert {rows} /proc/nothing/rows.jsonl
convert {rows}
noise {rows} {out} --kind nonsense --rate 0.5
noise {rows} {out} --kind random_tokens --rate nan
noise {rows} {out} --kind random_tokens --rate 1.5
noise {rows} {out} --kind random_tokens --rate -1
noise {rows} {out} --kind random_tokens --rate much
noise {rows} {out} --kind random_tokens --rate 0.5 --seed -1
noise {rows} {out} --kind random_tokens --rate 0.5 --tokenizer {good}/missing
noise {rows} {out} --kind random_tokens --rate 0.5 --tokenizer {rows}
noise {rows} {out} --kind random_tokens --rate 0.5 --tokenizer {good}
noise {rows} {out} --kind random_tokens
noise {rows} {rows} --kind random_tokens --rate 0.5 --overwrite
noise {rows} {model} --kind random_tokens --rate 0.5 --overwrite
lens nonsense
lens qtarget.nothing:there
lens no.such.module:loss
lens os:getcwd
lens raises_at_import:loss
lens exits_at_import:loss
lens sft --output {rows}
lens sft --output {model}
lens sft --json {rows}
lens sft --output /proc/nothing/lens.html
lens sft --png /proc/nothing/lens.png
report {good}/missing
report {rows}
report {model}
report {cache}
report {good}
report {trained} --output {model}
report {trained} --output {out} --rows {good}/missing
report {trained} --output {out} --rows {model}/model.safetensors
report {trained} --output {out} --from-step 77
report {trained} --output {out} --from-step nan
report {trained} --output /proc/nothing/report.html
serve {good}/missing
serve {rows}
serve {model} --port -1
serve {model} --port 99999
serve {model} --port web
serve {model} --host nonsense.invalid
serve {model} --host 0.0.0.0
serve {model} --token-file {good}/missing
serve {model} --token-file {good}
serve {model} --dtype nonsense
serve {model} --device nonsense
serve {model} --device cuda:77
serve {model} --workers 0
serve {model} --workers -1
serve {model} --max-batch 0
serve {model} --wait-ms -1
serve {model} --tokens-per-batch -1
serve {model} --queue 0
serve {model} --timeout nan
serve {model} --timeout -1
serve {model} --start-timeout nan
serve {model} --max-restarts -1
serve {model} --header-timeout nan
serve {model} --max-connections 0
cache info {good}/missing
cache info {rows}
cache info {model}
cache verify {cache} --model {good}/missing --config {config}
cache verify {cache} --model {model}
cache verify {cache} --model {model} --config {rows}
cache verify {cache} --rows 0
cache verify {cache} --model {model} --config {config} --tolerance nan
cache verify {cache} --verify-key {key}
cache verify {cache} --verify-key {good}/missing
cache sign {cache} --key {good}/missing
cache sign {cache} --key {good}
cache sign {cache} --key {rows}x
cache sign {model} --key {key}
cache merge {cache} --output {cache}
cache merge {cache} {good}/missing --output {out}
cache merge {cache} {other_cache} --output {model}
cache merge {cache} {other_cache} --output {rows}
cache merge --output {out}
cache import nonsense {rows} --output {out} --model m --tokenizer {model}
cache import verl {rows} --output {out} --model m --tokenizer {model}
cache import axolotl {rows} --output {out} --model m --tokenizer {model}
cache import distillkit {good}/missing --output {out} --model m --tokenizer {model}
cache import distillkit {model} --output {out} --model m --tokenizer {model}
cache import axolotl {rows} --output {out} --model m --tokenizer {good}/missing
cache import axolotl {rows} --output {out} --model m --tokenizer {model} --vocab-size 0
cache import axolotl {rows} --output {out} --model m --tokenizer {model} --shift -7
cache export {cache} nonsense --config {config} --output {out}
cache export {cache} verl --config {rows} --output {out}
cache export {cache} verl --config {config} --output {model}
cache export {cache} verl --config {config} --output {cache}
cache export {other_cache} verl --config {config} --output {out}
bench speed --tokens 0
bench speed --dtype nonsense
bench speed --device nonsense
bench speed --suite nonsense
bench speed --threads 0
bench speed --output {model}
bench sweep --shapes nonsense
bench sweep --time-tokens nonsense
bench sweep --losses nonsense
bench figure {good}/missing
bench figure {rows}
bench figure {model}
bench cache --model {good}/missing
bench cache --rows 0
bench cache --length 1
bench noise --tasks nonsense
bench noise --tasks math --data {good}/missing
bench noise --scale nonsense
bench noise --scale gpu --corpus {good}/missing
bench prior --scale nonsense
bench distill --scale nonsense
bench distill --workers 0
demo --targets nonsense
demo --rate nan
demo --kind nonsense
demo --output {model}
""".strip().splitlines()
EVALUATE = [
    f"evaluate {{model}} --output {{out}} {words}"
    for words in """
--data {rows} --metric nonsense
--data {rows} --metric no.such:function
--data {rows} --metric raises_at_import:function
--data {rows} --metric os:getcwd
--data {rows} --metric regex
--data {rows} --metric regex --pattern (
--data {rows} --limit 0
--data {rows} --temperature nan
--data {rows} --temperature -1
--data {rows} --samples 0
--data {rows} --max-new-tokens 0
--data {rows} --batch-size 0
--data {rows} --base {good}/missing
--data {rows} --base {rows}
--data {rows} --forgetting {good}/missing
--data {rows} --url http://127.0.0.1:9
--data {rows} --url nonsense
--data {rows} --no-nll --no-generate
--data {good}
""".strip().splitlines()
]
