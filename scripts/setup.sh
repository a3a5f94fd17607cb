#!/usr/bin/env bash
# Makes this machine ready to build: Debian packages and a virtual environment with pinned wheels in .venv.
# usage: setup.sh [--test|--bench]    also installs what the tests, or the benchmarks, compare with
set -euo pipefail
cd "$(dirname "$0")/.."

# By what the packages hold, so that it is seen wherever that comes from.
missing=()
while read -r package probe; do
  bash -c "$probe" </dev/null >/dev/null 2>&1 || missing+=("$package")
done < <(grep -v '^#' scripts/debian-packages.txt)

if [ ${#missing[@]} -gt 0 ]; then
  as_root=
  [ "$(id -u)" = 0 ] || as_root=sudo
  if ! command -v apt-get >/dev/null || { [ -n "$as_root" ] && ! command -v sudo >/dev/null; }; then
    echo "setup: install what these Debian packages hold, then run make again:" >&2
    printf '  %s\n' "${missing[@]}" >&2
    exit 1
  fi
  echo "setup: installing ${missing[*]}"
  $as_root apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# Installs a list of wheels into a virtual environment; a stamp a list, since pip is slow even where there is nothing to do.
install() {
  local venv=$1 list=$2 stamp
  stamp=$venv/$(basename "$list").stamp
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  cmp -s "$list" "$stamp" && return
  echo "setup: installing the wheels of $list"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check -r "$list"
  cp "$list" "$stamp"
}
install .venv scripts/requirements.txt
cmake -P cmake/jinja.cmake
case "${1:-}" in
  --test) install .venv scripts/requirements-test.txt ;;
  --bench) install .venv-bench scripts/requirements-bench.txt ;;
esac
