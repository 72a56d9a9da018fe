#!/usr/bin/env bash
# Installs the test extras into the same virtual environment as the demo and runs the tests.
#   bash launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh

make_venv ".[test]"
ruff check .
ruff format --check .
exec python -m pytest "$@"
