#!/usr/bin/env bash
# The tests with the oldest packages that requirements.txt and requirements-dev.txt allow, in an environment of its own
# outside the tree:
#
#     scripts/oldest.sh [pytest arguments]        # default: every test
#
# VENV (default: ~/.cache/mjp-oldest) is kept, so that a second run downloads nothing; PYTHON picks the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-$HOME/.cache/mjp-oldest}
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
minima=$(grep -hE '^[a-z].*>=' requirements.txt requirements-dev.txt)
sed 's/>=/==/' <<< "$minima" | "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r /dev/stdin
"$VENV/bin/python" -m pip list --format=freeze --disable-pip-version-check |
    grep -iE "^($(sed -nE 's/^([a-z-]+).*>=.*/\1/p' <<< "$minima" | paste -sd'|'))=="
"$VENV/bin/python" -m pytest "$@"
