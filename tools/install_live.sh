#!/usr/bin/env bash
# Real engines on a machine without a GPU: vLLM's CPU build, llama.cpp's server, sentence-transformers, in a virtual
# environment of their own (.sage/live), and small models for them (.sage/models). Needs 4 GB of disk and a few minutes;
# run again, it does nothing until the list or the recipe of the models changes. `make install-live` calls it.
#
# The index of packages has torch as a build for CUDA too, which drags in gigabytes of libraries. Where pip is configured
# with an index of CPU builds, that one is taken; it is the one vLLM's CPU build was made for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
live=".sage/live"
models=".sage/models"
list="tools/live-requirements.txt"
stamp="$live/.installed"

case "$(uname -sm)" in
  "Linux x86_64") ;;
  *)
    echo "install_live.sh: vLLM's CPU build is installed on Linux on x86_64 only, this is $(uname -sm)" >&2
    exit 2
    ;;
esac
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || {
  echo "install_live.sh: vLLM needs Python 3.11 to 3.14, $python is another; set PYTHON" >&2
  exit 2
}

wanted="$(cat "$list" tools/live_models.py tools/install_live.sh | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

echo "installing real engines into $live (minutes the first time)"
[ -x "$live/bin/python" ] || "$python" -m venv "$live"
export PIP_DISABLE_PIP_VERSION_CHECK=1
# pip compiles what it installs; the engines look for that beside the sources, whoever starts them.
unset PYTHONPYCACHEPREFIX PYTHONPATH
# torch with what it depends on, which differs between its builds; everything else as listed.
"$live/bin/python" -m pip install --quiet "$(grep '^torch==' "$list")"
"$live/bin/python" -m pip install --quiet --no-deps --requirement "$list"
# Our own packages, read where they are written: what runs here needs their Python, not the native module.
site="$("$live/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
printf '%s\n' "$PWD" "$PWD/policies" > "$site/sage.pth"
"$live/bin/python" -c 'import sage_live, torch, transformers, uvloop, vllm, xllamacpp'

# Made again when the recipe changes.
rm -rf "$models"
HF_HUB_OFFLINE=1 "$live/bin/python" tools/live_models.py "$models"
printf '%s\n' "$wanted" > "$stamp"
