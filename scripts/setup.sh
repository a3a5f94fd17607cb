#!/usr/bin/env bash
# Makes this machine ready to build: Debian packages and a virtual environment with pinned wheels in .venv.
# usage: setup.sh [--test]    --test also installs what the tests compare with
set -euo pipefail
cd "$(dirname "$0")/.."

needed=$(grep -v '^#' scripts/debian-packages.txt)
missing=()
if command -v dpkg-query >/dev/null; then
  for package in $needed; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
else
  echo "setup: no dpkg here, so nothing was installed.  The build needs what these Debian packages hold:" >&2
  echo "$needed" | sed 's/^/  /' >&2
fi

if [ ${#missing[@]} -gt 0 ]; then
  as_root=
  [ "$(id -u)" = 0 ] || as_root=sudo
  if ! command -v apt-get >/dev/null || { [ -n "$as_root" ] && ! command -v sudo >/dev/null; }; then
    echo "setup: install these packages, then run make again:" >&2
    printf '  %s\n' "${missing[@]}" >&2
    exit 1
  fi
  echo "setup: installing ${missing[*]}"
  $as_root apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

[ -x .venv/bin/python ] || python3 -m venv .venv
# A stamp per list: pip is slow even where there is nothing to do.
install() {
  local stamp=.venv/$(basename "$1").stamp
  cmp -s "$1" "$stamp" && return
  echo "setup: installing the wheels of $1"
  .venv/bin/python -m pip install -q --disable-pip-version-check -r "$1"
  cp "$1" "$stamp"
}
install scripts/requirements.txt
if [ "${1:-}" = --test ]; then install scripts/requirements-test.txt; fi
