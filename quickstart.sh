#!/usr/bin/env bash
# From a clone to a first result. A thin front to the Makefile, for those who look for an install script.
#
#   ./quickstart.sh             install, then run the demo       = make demo
#   ./quickstart.sh --install   install only                     = make install
#   ./quickstart.sh --help      this text
#
# Needs Python 3.11 or later with venv, g++ and make; on Debian or Ubuntu: sudo tools/install-debian.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

command -v make >/dev/null || {
  echo "quickstart.sh: make is not on PATH; on Debian: sudo tools/install-debian.sh" >&2
  exit 2
}

case "${1-}" in
  "") exec make demo ;;
  --install) exec make install ;;
  -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" ;;
  *)
    echo "quickstart.sh: unknown argument '$1': expected --install or --help, or nothing" >&2
    exit 2
    ;;
esac
