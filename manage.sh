#!/usr/bin/env bash
# Developer tasks by the names people look for. A thin front to the Makefile; arguments after the task go to make.
#
#   ./manage.sh install     virtual environment, package, developer tools
#   ./manage.sh demo        the policy comparison of the README
#   ./manage.sh test        lint and tests
#   ./manage.sh install-live  real engines for a machine without a GPU
#   ./manage.sh test-live   tests against real engines
#   ./manage.sh quality     lint only: ruff, mypy, import-linter, clang-format
#   ./manage.sh format      rewrite sources in the house style
#   ./manage.sh examples    run every example
#   ./manage.sh docs        redraw what the documents take from the code
#   ./manage.sh bench       benchmark the core
#   ./manage.sh doctor      what this machine has and lacks
#   ./manage.sh hooks       install the pre-commit hooks into this clone
#   ./manage.sh clean       delete builds and caches
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

task="${1-help}"
[ $# -eq 0 ] || shift
case "$task" in
  install | install-live | demo | test | test-live | format | examples | docs | bench | clean) exec make "$task" "$@" ;;
  quality) exec make --keep-going lint "$@" ;;
  doctor) make install && exec "${VENV:-.venv}/bin/sage" doctor "$@" ;;
  hooks) make install && exec "${VENV:-.venv}/bin/pre-commit" install "$@" ;;
  help | -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" ;;
  *)
    echo "manage.sh: unknown task '$task'; ./manage.sh help lists them" >&2
    exit 2
    ;;
esac
