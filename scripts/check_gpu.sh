#!/usr/bin/env bash
# What a machine with a GPU is asked, in under 10 minutes; raw results go to $OUT (default: runs/gpu).
#     scripts/check_gpu.sh            on a GPU
#     DEVICE=cpu scripts/check_gpu.sh tries the script itself
# Each part has its own time limit; one that fails does not stop the next. The exit code is the number of parts that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
export PYTHONPATH="$PWD/src:$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
failed=0

part() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 begin=$SECONDS code=0
  shift 2
  timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1 || code=$?
  [ "$code" = 0 ] || failed=$((failed + 1))
  echo "$name: exit $code, $((SECONDS - begin)) s" | tee -a "$OUT/summary.txt"
}

small() { # shapes that a processor computes in seconds
  [ "$DEVICE" = cuda ] || echo --tokens 64 --width 64 --vocab 512 --rounds 1 --threads 1
}

: >"$OUT/summary.txt"
{ nvidia-smi || true; $PYTHON -c "import torch; print(torch.__version__, torch.cuda.is_available())"; } >"$OUT/machine.txt" 2>&1
base=src/qtarget/data/embedded/base_model
hardware=(--bf16 true)
[ "$DEVICE" = cuda ] || hardware=(--bf16 false --use_cpu true)
train=($PYTHON -m qtarget train examples/watch/run.yaml --max_steps 5 --report_to none --eval_strategy no --eval_on_start false --save_strategy no "${hardware[@]}")

part kernels 150 $PYTHON -m pytest -q -x -p no:cacheprovider tests/loss/test_triton.py tests/loss/test_backends.py
part speed 120 $PYTHON -m qtarget bench speed --device "$DEVICE" --output "$OUT/speed.json" $(small)
part sft 60 "${train[@]}" --output_dir "$OUT/sft"
part reference 60 "${train[@]}" --target asft --output_dir "$OUT/asft"
part lora 60 "${train[@]}" --use_peft true --lora_target_modules q_proj v_proj --output_dir "$OUT/lora"
part teacher 60 "${train[@]}" --target distillation --teacher $base --output_dir "$OUT/distillation"
part evaluate 60 $PYTHON -m qtarget evaluate "$OUT/sft" --data src/qtarget/data/embedded/demonstrations/test.jsonl --limit 64 --output "$OUT/evaluation.json"
exit "$failed"
