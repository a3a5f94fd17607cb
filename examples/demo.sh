#!/usr/bin/env bash
# From a trained model to plans, and what the model still knows with them.  usage: demo.sh PROGRAM
set -euo pipefail
program=$1
model=$(dirname "$0")/demo
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

step() {
  printf '\n$ veloxquant %s\n' "$(printf '%s ' "$@" | sed "s|$out/||g; s|$model|examples/demo|g")"
  "$program" "$@"
}

echo "1. How much does each layer mind noise in its keys and values?  (on text that the model writes itself)"
step sensitivity "$model" --samples 16 --length 256

echo
echo "2. Give layers bits by that, and write it down: TurboQuant in 2 bits of codes and a norm; then VecInfer's codebooks in 2 bits."
step calibrate "$model" --method turboquant --bits 2.25 --samples 16 --length 256 -o "$out/turboquant.plan"
step calibrate "$model" --method vecinfer --bits 2 -o "$out/vecinfer.plan"

echo
echo "3. The best there is: a width for each head, by one backward pass, in 1.5 bits with everything counted."
step calibrate "$model" --bits 1.5 --samples 12 -o "$out/best.plan"

echo
echo "4. What does the model still know, next to what others keep?  (own text of another seed, and facts sown in it)"
step evaluate "$model" --plan "$out/best.plan" --plan "$out/vecinfer.plan" --plan "$out/turboquant.plan" --peer mlx4 --peer mlx2 --peer kivi2 --peer turboquant2 \
  --windows 4 --length 1024 --recall 8 --seed 1
