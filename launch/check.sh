#!/usr/bin/env bash
# What can be checked without running anything: style, types, and the docs site, in the same virtual environment as the tests.
#   bash launch/check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh

make_venv ".[test]"
ruff check .
ruff format --check .
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet --site-dir "$site"
pyright
