#!/usr/bin/env bash
# Runs every test: include order, C++ (CTest), and the comparisons with independent references (pytest); counts them all.
# usage: test.sh BUILD_FOLDER [PYTEST_MARKERS]    which comparisons to run, "not slow" if nothing is said
set -uo pipefail
cd "$(dirname "$0")/.."
build=$(cd "$1" && pwd) || exit 1
failed_suites=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT

.venv/bin/python scripts/check_includes.py || failed_suites=$((failed_suites + 1))

# Tests that take longer where they are asked for look at this.
[ -z "${2:-}" ] || export VELOXQUANT_SLOW=1

ctest --test-dir "$build" --output-on-failure --timeout 600 -j "$(nproc)" 2>&1 | tee "$log" | grep -vE '^ *(Start |[0-9]+/[0-9]+ Test .* Passed )'
[ "${PIPESTATUS[0]}" = 0 ] || failed_suites=$((failed_suites + 1))
total=$(sed -nE 's/.* tests? failed out of ([0-9]+).*/\1/p' "$log")
failed=$(sed -nE 's/.*, ([0-9]+) tests? failed out of.*/\1/p' "$log")
skipped=$(grep -c 'Skipped' "$log")

if [ -z "${VELOXQUANT_SHARED:-}" ] && [ -d ../shared ]; then VELOXQUANT_SHARED=$(cd ../shared && pwd); fi
export VELOXQUANT_SHARED=${VELOXQUANT_SHARED:-} VELOXQUANT_TOOLS=$build/tools VELOXQUANT_PROGRAM=$build/bin/veloxquant
.venv/bin/python -m pytest -q -p no:cacheprovider -m "${2:-not slow}" tests/python 2>&1 | tee "$log"
[ "${PIPESTATUS[0]}" = 0 ] || failed_suites=$((failed_suites + 1))
count() { sed -nE "s/(^|.*[^0-9])([0-9]+) ($1).*/\2/p" <(tail -n 1 "$log"); }
py_passed=$(count passed) py_failed=$(count 'failed|error') py_skipped=$(count skipped)

all_failed=$((${failed:-0} + ${py_failed:-0}))
[ "$failed_suites" = 0 ] || [ "$all_failed" -gt 0 ] || all_failed=$failed_suites
echo "$((${total:-0} - ${failed:-0} - skipped + ${py_passed:-0})) passed, $all_failed failed, $((skipped + ${py_skipped:-0})) skipped"
[ "$failed_suites" = 0 ]
