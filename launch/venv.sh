# shellcheck shell=bash
# Sourced by demo.sh and test.sh: one virtual environment, reinstalled only when the packaging changed.

make_venv() { # make_venv WHAT: activates the environment with WHAT (a pip requirement of this checkout) installed
  local python="${PYTHON:-python3}" venv="${VENV:-.venv}" what="$1" stamp
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
    echo "error: $python is $("$python" --version 2>&1), but Python 3.11 to 3.13 is needed; set PYTHON=/path/to/python" >&2
    exit 2
  fi
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # shellcheck disable=SC1091
  . "$venv/bin/activate"
  stamp="$venv/.installed-$(printf '%s' "$what" | tr -c 'a-z\n' _)-$(cksum <setup.py | cut -d' ' -f1)"
  if [ ! -e "$stamp" ]; then
    echo "installing $what into $venv"
    pip install --quiet --disable-pip-version-check --editable "$what"
    touch "$stamp"
  fi
}
