#!/usr/bin/env bash
# The whole study on the embedded model, with the paper's section on suffixes: makes a virtual environment, installs, runs, prints
# the results.
#   bash launch/demo.sh [WORKDIR]     default WORKDIR: runs/demo
# PYTHON picks the interpreter (3.11 or newer), VENV the environment's folder.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh

make_venv "."
echo "running the study"
refusal-jax study --config=configs/demo.py --workdir="${1:-runs/demo}"
echo "looking at what a suffix does to the direction"
exec refusal-jax mechanism --direction="${1:-runs/demo}" --parts=suffixes,attribution,attention
