#!/usr/bin/env bash
# The worker's half of tpu_vm.sh, which copies it to every worker of a slice and calls it there over ssh.
#   tpu_worker.sh install SOURCE_STAMP PACKAGE     Python, virtual environment and PACKAGE, from ~/refusal-jax.tgz
#   tpu_worker.sh start JOB_STAMP JOB [FLAGS]      starts `refusal-jax JOB [FLAGS]`, detached from the ssh session
#   tpu_worker.sh status|log|stop                  log: everything that the job printed
# Each prints one line, `@worker HOST STATE ...`, that tpu_vm.sh reads. All it needs lies in ~/refusal-jax-job.
set -euo pipefail

HOME_JOB="$HOME/refusal-jax-job"
SELF="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"

say() { printf '@worker %s %s\n' "$(hostname)" "$*"; }

install_job() { # SOURCE_STAMP PACKAGE
  cd "$HOME_JOB"
  if [ "$(cat installed 2>/dev/null)" != "$1 $2" ] && ! running; then
    rm -rf source installed
    mkdir source
    tar -xzf "$HOME/refusal-jax.tgz" -C source
    # The VM images come with Python 3.10. uv brings a newer one without root, and without the apt lock that a fresh
    # VM's unattended upgrades hold for minutes; pip fetches uv itself, so that no script is piped into a shell.
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    [ -x venv/bin/python ] || uv venv --quiet --python '>=3.11,<3.14' venv
    (cd source && uv pip install --quiet --python "$HOME_JOB/venv/bin/python" "$2")
    echo "$1 $2" >installed
  fi
  say installed
}

# The job and all its children hold the lock: unlike a process id it is never reused, and a reboot releases it.
running() { ! flock --nonblock "$HOME_JOB/lock" true; }

start_job() { # JOB_STAMP JOB [FLAGS]
  cd "$HOME_JOB/source"
  exec 9>"$HOME_JOB/lock"
  if flock --nonblock 9; then
    rm -f ../exit_code ../pid
    echo "$1" >../stamp
    trap '' HUP # the ssh session may end before the next line has taken effect
    setsid bash "$SELF" attend "${@:2}" >../log 2>&1 </dev/null &
    exec 9>&-
  elif [ "$(cat ../stamp)" != "$1" ]; then
    say busy # with another job
    return
  fi
  say started
}

attend() { # JOB [FLAGS]
  local code=0
  echo "$$" >"$HOME_JOB/pid"
  PYTHONUNBUFFERED=1 "$HOME_JOB/venv/bin/refusal-jax" "$@" || code=$?
  echo "$code" >"$HOME_JOB/exit_code"
}

last_line() { # of the log; progress bars write carriage returns, and control characters have no place in a terminal
  tail -c 4000 "$HOME_JOB/log" | tr '\r' '\n' | tr -d '\000-\011\013-\037\177' | grep -v '^ *$' | tail -n 1 | cut -c 1-200
}

status() {
  local stamp
  stamp="$(cat "$HOME_JOB/stamp" 2>/dev/null || echo none)"
  if running; then
    say running "$stamp" "$(last_line || true)"
  elif [ -s "$HOME_JOB/exit_code" ]; then
    say exited "$stamp" "$(cat "$HOME_JOB/exit_code")"
  elif [ "$stamp" != none ]; then
    say lost "$stamp" # ended without a word: the VM was restarted, or somebody killed it
  else
    say idle "$stamp"
  fi
}

stop_job() {
  local signal
  for signal in TERM TERM KILL; do
    running || break
    kill -s "$signal" -- "-$(cat "$HOME_JOB/pid")" || true # the whole process group
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      running || break
      sleep 0.5
    done
  done
  [ ! -e "$HOME_JOB/stamp" ] || [ -s "$HOME_JOB/exit_code" ] || echo 130 >"$HOME_JOB/exit_code"
  say stopped
}

mkdir -p "$HOME_JOB"
case "${1:-}" in
  install) install_job "${@:2}" ;;
  start) start_job "${@:2}" ;;
  attend) attend "${@:2}"; exit ;; # reads no further: a newer copy of this file may be here by then
  status) status ;;
  log) cat "$HOME_JOB/log" ;;
  stop) stop_job ;;
  *) sed -n '2,7s/^# //p' "$0" >&2; exit 2 ;;
esac
