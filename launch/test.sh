#!/usr/bin/env bash
# Installs the test extras into the same virtual environment as the demo and runs the tests.
#   bash launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh

make_venv ".[test]"
# One process a core, up to four. A file's tests stay together, because they share what they compile; files begin in the order of
# tests/conftest.py, the longest first.
cores=$(getconf _NPROCESSORS_ONLN)
exec python -m pytest --numprocesses "$((cores < 4 ? cores : 4))" --dist loadfile --no-loadscope-reorder "$@"
