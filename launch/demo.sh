#!/usr/bin/env bash
# The whole study on the embedded model: makes a virtual environment, installs, runs, prints the results.
#   bash launch/demo.sh [WORKDIR]     default WORKDIR: runs/demo
# PYTHON picks the interpreter (3.11 or newer), VENV the environment's folder.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh

make_venv "."
echo "running the study"
exec refusal-jax study --config=configs/demo.py --workdir="${1:-runs/demo}"
