#!/usr/bin/env bash
# Runs the suite on the newest PyTorch and on 2.4, each in a virtual environment of its own, and prints what came of it.
#
#   tests/versions.sh [FOLDER] [pytest arguments]
#
# FOLDER (default: a temporary one) keeps the environments for the next time. Needs Python 3.10 to 3.12, which 2.4 supports,
# as `python3` or in PYTHON; PIP_INDEX_URL and the like are pip's own.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-}
[ $# -gt 0 ] && shift
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
python=${PYTHON:-python3}
declare -A packages=([newest]="torch torchvision" [2.4]="torch==2.4.* torchvision==0.19.*")
report="" failed=0
for name in newest 2.4; do
    venv="$folder/$name"
    if [ ! -e "$venv/installed" ]; then
        # shellcheck disable=SC2086
        "$python" -m venv "$venv" && "$venv/bin/pip" install --quiet ${packages[$name]} -r requirements-dev.txt && touch "$venv/installed"
    fi
    if [ ! -e "$venv/installed" ]; then
        report+="$name: could not be installed"$'\n'
        failed=1
        continue
    fi
    versions=$("$venv/bin/python" -c 'import sys, numpy, PIL, torch, torchvision
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__},",
      f"numpy {numpy.__version__}, pillow {PIL.__version__}")')
    log="$folder/$name.log"
    "$venv/bin/python" -m pytest -q "$@" 2>&1 | tee "$log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
    report+="$name ($versions): $(tail -n 1 "$log")"$'\n'
done
printf '\n%s' "$report"
exit $failed
