#!/usr/bin/env bash
# What SAGE needs from Debian 12 or Ubuntu 24.04 and later. Run as root. Everything else is installed into .venv by make.
# With --report also what only tests of the report use, and skip where it is missing: a browser and a LaTeX.
set -euo pipefail

packages=(
  g++           # native operators (C++20)
  make          # the targets of the README
  git           # a run's manifest records the commit
  python3       # 3.11 or later
  python3-venv  # the virtual environment
  python3-dev   # Python.h, for the bindings
  ca-certificates
)
report=(
  chromium                   # opens the report's page
  texlive-latex-recommended  # compiles its tables and figures
)

if [ "${1-}" = "--report" ]; then
  packages+=("${report[@]}")
  shift
fi
if [ "${1-}" = "--list" ]; then
  printf '%s\n' "${packages[@]}"
  exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "install-debian.sh: needs root; run: sudo $0" >&2
  exit 2
fi
command -v apt-get >/dev/null || {
  echo "install-debian.sh: apt-get is not on PATH; install by other means: ${packages[*]}" >&2
  exit 2
}
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${packages[@]}"
