#!/bin/bash
# Calibrates on a GPU and says seconds, tokens per second of the samples, and the most memory that the GPU had in use.
# usage: gpu.sh PROGRAM MODEL [OPTION of calibrate]…
set -euo pipefail
program=$1 model=$2
shift 2
work=$(mktemp -d)
trap 'kill "$watch" 2>/dev/null || true; rm -rf "$work"' EXIT
while sleep 0.2; do nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits; done > "$work/memory" &
watch=$!
begin=$(date +%s.%N)
"$program" calibrate "$model" --device gpu -o "$work/plan.safetensors" --json "$@" > "$work/plan.json"
end=$(date +%s.%N)
python3 - "$work" "$model" "$begin" "$end" <<'PY'
import json, sys
work, model, begin, end = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
plan = json.load(open(work + "/plan.json"))
tokens = plan["provenance"]["num_samples"] * plan["provenance"]["sequence_length"]
peak = max(map(int, open(work + "/memory").read().split()))
print(f"{model}: {end - begin:.0f} s, {tokens} tokens ({tokens / (end - begin):.0f} tokens/s), peak {peak / 1024:.1f} GiB, "
      f"{plan['effective_bits']:.3f} bits, predicted KL {plan['predicted_kl']:.5f}")
PY
