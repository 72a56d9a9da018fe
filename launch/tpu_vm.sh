#!/usr/bin/env bash
# Runs one refusal-jax job on a Cloud TPU VM slice, from nothing to its results. `bash launch/tpu_vm.sh --help` explains.
set -euo pipefail

usage() {
  cat <<'USAGE'
bash launch/tpu_vm.sh COMMAND [SETTINGS] -- JOB [FLAGS]

Runs `refusal-jax JOB [FLAGS]` on every worker of a Cloud TPU VM slice. It needs gcloud, logged in, and a project with TPU
quota. For example, a study of a 70B model on 16 spot chips:

  bash launch/tpu_vm.sh run --zone=us-west4-a --type=v5e-16 --spot -- \
    study --config=configs/paper.py:llama_3_70b --model=gs://BUCKET/Meta-Llama-3-70B-Instruct --workdir=gs://BUCKET/runs/llama_3_70b

`run` queues for the slice, installs this checkout on all workers, starts the job detached from ssh, follows it, fetches the
results and deletes the slice. When the slice is preempted it is deleted, created again, and the same job started, which resumes
from its workdir. When this script is interrupted, slice and job go on; the same command follows them again.

Commands (same settings, same job):
  run      create, install, start, follow, fetch, delete, and again from create until the job is done
  create   queue for the slice and wait until it is ready
  install  Python and refusal-jax on all workers
  start    start the job on all workers, detached
  follow   wait for the job's end; exits with its exit code
  fetch    copy the workdir here, from gs:// or from worker 0
  delete   delete the slice; it is billed until then
  status   what the slice and each worker do
  logs     follow the log of worker 0 (Ctrl-C leaves the job alone)
  stop     end the job on all workers, keep the slice

Settings, as flags or in the environment (--zone is TPU_ZONE, and so on):
  --name=refusal-jax    the slice; several slices need several names
  --zone=ZONE           needed; where your quota is
  --project=PROJECT     default: gcloud's
  --type=v5e-16         accelerator type, as gcloud or `refusal-jax plan` names it (v5e-16, v5p-16, v6e-16, v4-16)
  --runtime=VERSION     VM image; default: the one for the type
  --spot                cheaper, can be preempted (TPU_SPOT=1); default: on demand
  --package=REQUIREMENT what pip installs; default: this checkout. Or 'refusal-jax[tpu,gcs]==1.0', 'refusal-jax[tpu,gcs] @ git+https://...'
  --results=runs        folder here for results and logs
  --delete=success      when `run` ends, delete the slice after success, always, or never
  --tries=10            how often a lost slice or a crashed job is begun again
  --poll=30             seconds between two looks; waits between tries double from there, up to 10 minutes
  --dry-run             print every command instead, ready to paste; needs no gcloud
  TPU_CREATE_FLAGS      more flags for `queued-resources create`, for example "--network=n --internal-ips --service-account=s"
  TPU_SSH_FLAGS         more flags for ssh and scp, for example "--tunnel-through-iap"

The job's exit codes 1 to 4 (a bug, bad input, a failed verification, no direction) are final, and become this script's; with 4
the results are fetched as with 0. A job that crashed or vanished on a worker is started again (`follow` alone exits with 75
then). The workdir of a spot slice must be on gs://, because a preemption takes the disks along, and so should that of any slice
with several workers. The VMs' service account needs read access to the model and write access to the workdir. Settings, job and
logs are shown and sent in clear: no place for secrets.
USAGE
}

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SCRIPT="$0"
AGAIN=75      # an attempt that may be repeated; sysexits.h's "temporary failure"
SLICE=''      # not empty: there is a slice, and it is billed
STATE=unknown # absent, waiting, ready, lost or unknown
WAS_READY=''  # not empty: it has been ready before
HOSTS=0       # workers of a ready slice
JOB=()

exec 3>&1 4>&2 # traps run inside of whatever redirection the signal meets
say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&4; }
die() { printf 'error: %s\n' "$*" >&4; exit 2; }
quoted() { # the words as one line that a shell reads as these words
  local word line='' quote="'\\''"
  for word in "$@"; do
    case "$word" in '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//\'/$quote}'" ;; esac
    line="$line $word"
  done
  printf '%s' "${line# }"
}
pause() { sleep "$(($1 * TPU_POLL < 600 ? $1 * TPU_POLL : 600))"; }

parse() {
  COMMAND='' DRY_RUN='' TPU_SPOT="${TPU_SPOT:-}"
  local key
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage; exit 0 ;;
      --spot) TPU_SPOT=1 ;;
      --dry-run) DRY_RUN=1 ;;
      --name=* | --zone=* | --project=* | --type=* | --runtime=* | --package=* | --results=* | --delete=* | --tries=* | --poll=*)
        key="${1%%=*}"
        printf -v "TPU_$(printf %s "${key#--}" | tr '[:lower:]' '[:upper:]')" %s "${1#*=}"
        ;;
      --) shift; JOB=("$@"); break ;;
      -*) die "unknown setting $1. Settings are written --name=value and stand before the --; see --help." ;;
      *) [ -z "$COMMAND" ] || die "unexpected argument $1: the job stands after a --; see --help."; COMMAND="$1" ;;
    esac
    shift
  done
}

settings() { # fills in and checks the settings, and what follows from them
  : "${TPU_NAME:=refusal-jax}" "${TPU_TYPE:=v5e-16}" "${TPU_PACKAGE:=.[tpu,gcs]}" "${TPU_RESULTS:=runs}" "${TPU_DELETE:=success}"
  : "${TPU_TRIES:=10}" "${TPU_POLL:=30}"
  [ -n "${TPU_ZONE:-}" ] || die "no zone is given. Set --zone=ZONE, or TPU_ZONE, to where your TPU quota is."
  case "$TPU_DELETE" in success | always | never) ;; *) die "--delete=$TPU_DELETE is none of success, always, never." ;; esac
  local number
  for number in "$TPU_TRIES" "$TPU_POLL"; do
    case "$number" in '' | *[!0-9]*) die "--tries and --poll are whole numbers, but one of them is '$number'." ;; esac
  done
  TPU_TYPE="${TPU_TYPE/#v5e-/v5litepod-}"
  case "$TPU_TYPE" in
    v5litepod-*) : "${TPU_RUNTIME:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${TPU_RUNTIME:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${TPU_RUNTIME:=v2-alpha-tpuv6e}" ;;
    v[234]-*) : "${TPU_RUNTIME:=tpu-ubuntu2204-base}" ;;
    *) [ -n "${TPU_RUNTIME:-}" ] || die "no VM image is known for --type=$TPU_TYPE. Name one with --runtime=VERSION." ;;
  esac
  PLACE=(--zone="$TPU_ZONE" ${TPU_PROJECT:+"--project=$TPU_PROJECT"})
  # the environment's extra flags are words
  read -r -a CREATE_FLAGS <<<"${TPU_CREATE_FLAGS:-}"
  read -r -a SSH_FLAGS <<<"${TPU_SSH_FLAGS:-}"
  job_settings
}

job_settings() { # WORKDIR and JOB_STAMP, from the job
  WORKDIR=''
  local word before=''
  for word in ${JOB[@]+"${JOB[@]}"}; do
    case "$before $word" in *" --workdir="*) WORKDIR="${word#*=}" ;; "--workdir "*) WORKDIR="$word" ;; esac
    before="$word"
  done
  WORKDIR="${WORKDIR%/}"
  JOB_STAMP="$(quoted ${JOB[@]+"${JOB[@]}"} | cksum | cut -d' ' -f1)"
  case "$COMMAND" in run | start | follow | fetch) ;; *) return 0 ;; esac
  [ "${#JOB[@]}" -gt 0 ] || die "no job is given. Put it after a --, for example: $COMMAND --zone=$TPU_ZONE -- study --workdir=gs://BUCKET/runs/first"
  [ -n "$WORKDIR" ] || die "the job has no --workdir=DIR, so its results could be neither resumed nor fetched. Add one, best gs://BUCKET/DIR."
  case "$TPU_SPOT $WORKDIR" in
    " "* | "1 gs://"*) ;;
    *) die "a preemption of a spot slice would lose the workdir $WORKDIR, which is on its disk. Use --workdir=gs://BUCKET/DIR, or leave out --spot." ;;
  esac
}

call() { # runs a command; in a dry run prints it
  if [ -n "$DRY_RUN" ]; then quoted "$@" >&3; echo >&3; else "$@"; fi
}

resource() { # VERB [FLAGS]: what is done to the queued resource
  call gcloud compute tpus queued-resources "$1" "$TPU_NAME" "${PLACE[@]}" "${@:2}"
}

on_workers() { # WHICH COMMAND...
  resource ssh --worker="$1" --quiet --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=15 \
    ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} --command="$(quoted "${@:2}")"
}

copy() { # WHICH FROM... TO
  call gcloud compute tpus queued-resources scp "${@:2}" "${PLACE[@]}" --worker="$1" --recurse --quiet \
    --scp-flag=-oConnectTimeout=20 --scp-flag=-oServerAliveInterval=15 ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"}
}

create_slice() {
  say "queueing for $TPU_TYPE in $TPU_ZONE${TPU_SPOT:+, spot}"
  SLICE=1 # even if the answer gets lost
  resource create --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_RUNTIME" \
    ${TPU_SPOT:+--spot} ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} --quiet
}

delete_slice() {
  local try
  say "deleting $TPU_NAME"
  for try in 1 2 3 4 5; do
    if resource delete --force --quiet; then SLICE='' STATE=absent; return 0; fi
    look
    [ "$STATE" != absent ] || return 0
    pause "$try"
  done
  return 1
}

describe() { # GROUP FORMAT: prints the answer, ABSENT or UNKNOWN
  if ! call gcloud compute tpus "$1" describe "$TPU_NAME" "${PLACE[@]}" --format="$2" 2>"$TEMP/error"; then
    if grep -q NOT_FOUND "$TEMP/error"; then echo ABSENT; else echo UNKNOWN; fi
  fi
}

look() { # sets STATE, SLICE and HOSTS
  local node
  STATUS="$(describe queued-resources 'value(state.state)')"
  case "$STATUS" in
    ABSENT) STATE=absent SLICE='' ;;
    CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) STATE=waiting SLICE=1 ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) STATE=lost SLICE=1 ;;
    ACTIVE)
      SLICE=1
      node="$(describe tpu-vm 'value(state,networkEndpoints.len())')"
      read -r STATUS HOSTS <<<"$node 0" || true
      HOSTS="${HOSTS%% *}"
      case "$STATUS" in
        READY) STATE=ready ;;
        ABSENT | PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING) STATE=lost ;;
        UNKNOWN) STATE=unknown ;;
        *) STATE=waiting ;; # CREATING, STARTING, RESTARTING, REPAIRING, REIMAGING
      esac
      ;;
    *) STATE=unknown ;;
  esac
}

ensure_slice() { # until there is a ready slice; fails if it cannot be created
  local before='' asked=''
  while :; do
    look
    [ "$STATUS" = "$before" ] || say "slice $TPU_NAME: $STATUS"
    before="$STATUS"
    case "$STATE" in
      ready) WAS_READY=1; return 0 ;;
      absent)
        if ! create_slice; then
          look
          [ -z "$WAS_READY" ] || return "$AGAIN" # the request was good before
          return 1
        fi
        asked=1
        ;;
      lost)
        if [ "$STATUS" = FAILED ]; then resource describe --format='yaml(state)' >&2 || true; fi
        delete_slice || return 1
        [ -z "$asked" ] || return "$AGAIN" # lost before it was ready: not at once again
        ;;
      unknown)
        [ -n "$SLICE" ] || { cat "$TEMP/error" >&2; return 1; }
        pause 1
        ;;
      waiting) pause 1 ;;
    esac
  done
}

answers() { # STATE COMMAND...: runs the worker script; fails unless every worker answers with STATE
  local wanted="$1"
  shift
  on_workers all bash tpu_worker.sh "$@" >"$TEMP/out" 2>"$TEMP/error" || true
  grep '^@worker ' "$TEMP/out" >"$TEMP/workers" || true
  [ "$(count "$wanted")" -eq "$HOSTS" ]
}

count() { awk -v state="$1" 'state == "any" || $3 == state {n++} END {print n + 0}' "$TEMP/workers"; }
bad() { awk '$3 == "lost" || $3 == "idle" || $3 == "exited" && $5 != 0 {n++} END {print n + 0}' "$TEMP/workers"; }
codes() { awk '$3 == "exited" {print $5} $3 == "lost" || $3 == "idle" {print $3}' "$TEMP/workers" | sort -u | tr '\n' ' '; }

install_workers() {
  local archive="$TEMP/refusal-jax.tgz" stamp try
  [ -z "$DRY_RUN" ] || archive="${TMPDIR:-/tmp}/refusal-jax.tgz"
  export COPYFILE_DISABLE=1 # no resource forks from a Mac
  call tar -C "$ROOT" -czf "$archive" --exclude=__pycache__ refusal_jax configs launch setup.py pyproject.toml README.md LICENSE ||
    return 1
  if [ -n "$DRY_RUN" ]; then stamp="$(date +%s)"; else stamp="$(cksum <"$archive" | cut -d' ' -f1)"; fi
  for try in 1 2 3; do
    say "installing on all workers"
    if copy all "$archive" "$ROOT/launch/tpu_worker.sh" "$TPU_NAME": >"$TEMP/out" 2>"$TEMP/error" &&
      answers installed install "$stamp" "$TPU_PACKAGE"; then
      return 0
    fi
    tail -n 20 "$TEMP/error" >&2
    look
    [ "$STATE" = ready ] || return "$AGAIN"
    pause "$try"
  done
  say "the installation failed three times; the reason is above"
  return 1
}

start_workers() {
  say "starting: refusal-jax $(quoted "${JOB[@]}")"
  answers started start "$JOB_STAMP" "${JOB[@]}" || { tail -n 20 "$TEMP/error" >&2; return "$AGAIN"; }
}

follow() { # until the job ends: 0, $AGAIN, or its exit code
  local unseen=0 mourning=0 line before=''
  while :; do
    look
    case "$STATE" in lost | absent) say "slice $TPU_NAME: $STATUS"; return "$AGAIN" ;; esac
    if [ "$STATE" = ready ] && answers any status; then
      unseen=0
      if [ "$(count running)" -eq 0 ]; then
        verdict
        return
      fi
      line="$(count running) of $HOSTS workers run: $(awk '$3 == "running"' "$TEMP/workers" | sort -k2 | head -n 1 | cut -d' ' -f5-)"
      # A process whose peer failed ends by itself within a minute; one that does not would wait for ever.
      if [ "$(bad)" -gt 0 ] && [ "$((mourning += 1))" -ge 10 ]; then answers stopped stop || true; fi
    elif [ "$STATE" = ready ]; then
      line="$(count any) of $HOSTS workers answer"
      [ "$((unseen += 1))" -lt 10 ] || { say "$line"; delete_slice || return 1; return "$AGAIN"; }
    else
      line="slice $TPU_NAME: $STATUS"
    fi
    [ "$line" = "$before" ] || say "$line"
    before="$line"
    pause 1
  done
}

verdict() { # on workers that all ended: 0, $AGAIN, or the job's exit code
  local ended
  ended="$(codes)"
  [ "$ended" != "0 " ] || { say "the job is done"; return 0; }
  say "the job ended on all workers, with: $ended"
  pause 2 # of a preemption, dying processes are the first sign
  look
  [ "$STATE" = ready ] || return "$AGAIN"
  case " $ended" in
    *lost* | *idle*) return "$AGAIN" ;;
  esac
  local code final=0
  for code in $ended; do
    case "$code" in
      0) ;;
      [1-4]) final="$code" ;;
      130) [ "$final" -ne 0 ] || final=130 ;;
      *) return "$AGAIN" ;; # killed by a signal
    esac
  done
  return "$final"
}

attempt() { # one way through: 0, $AGAIN, or a final exit code
  ensure_slice || return
  if answers any status && [ "$(count running)" -gt 0 ]; then
    if awk -v job="$JOB_STAMP" '$3 == "running" && $4 != job {found = 1} END {exit !found}' "$TEMP/workers"; then
      die "another job runs on $TPU_NAME. Stop it with \`bash $SCRIPT stop --name=$TPU_NAME --zone=$TPU_ZONE\`, or choose another --name."
    fi
    if [ "$(bad)" -eq 0 ]; then
      say "the job runs already"
      follow
      return
    fi
    answers stopped stop || return "$AGAIN"
  fi
  install_workers || return
  start_workers || return
  follow
}

fetch() {
  local to="$TPU_RESULTS/${WORKDIR##*/}"
  call mkdir -p "$to"
  say "fetching $WORKDIR to $to"
  case "$WORKDIR" in
    gs://*) call gcloud storage rsync --recursive ${TPU_PROJECT:+"--project=$TPU_PROJECT"} "$WORKDIR" "$to" ;;
    /*) copy 0 "$TPU_NAME:$WORKDIR" "$TPU_RESULTS" ;;
    *) copy 0 "$TPU_NAME:refusal-jax-job/source/$WORKDIR" "$TPU_RESULTS" ;;
  esac
}

fetch_logs() { # one file a worker, named by its number; what they say about a failure would go with the slice
  local to="$TPU_RESULTS/$TPU_NAME-logs"
  call mkdir -p "$to"
  SSH_FLAGS+=(--output-directory="$to")
  on_workers all bash tpu_worker.sh log >/dev/null 2>"$TEMP/error" || say "not all logs could be fetched"
  unset "SSH_FLAGS[${#SSH_FLAGS[@]}-1]"
  say "the workers' logs are in $to"
}

last_lines() { tr '\r' '\n' <"$1" | tr -d '\000-\011\013-\037\177' | tail -n 20; } # a log may hold a model's text

run() {
  local try code
  for ((try = 1; ; try++)); do
    code=0
    attempt || code=$?
    [ "$code" -eq "$AGAIN" ] || break
    if [ "$try" -ge "$TPU_TRIES" ]; then
      say "given up after $try tries; the same command goes on from the workdir"
      code=1
      break
    fi
    say "try $((try + 1)) of $TPU_TRIES follows"
    pause "$((1 << (try < 10 ? try - 1 : 9)))"
  done
  if [ "$STATE" = ready ]; then
    fetch_logs
    [ "$code" -eq 0 ] || last_lines "$TPU_RESULTS/$TPU_NAME-logs/0.log" >&2 || true
  fi
  if [ "$code" -eq 0 ] || [ "$code" -eq 4 ]; then # a study that found no direction has a report, too
    fetch || { TPU_DELETE=never; say "the results could not be fetched"; return 1; } # they may be on its disk only
  fi
  case "$TPU_DELETE $code" in always\ * | "success 0" | "success 4") [ -z "$SLICE" ] || delete_slice || true ;; esac
  return "$code"
}

note() { echo "# $*" >&3; }

dry_run() { # the commands of `run`, in order; the loops are comments
  note "is there such a slice?"
  describe queued-resources 'value(state.state)'
  note "if not:"
  create_slice
  note "the first of these until ACTIVE, then the second until READY; if it gets lost: delete, create, and on from there"
  describe queued-resources 'value(state.state)'
  describe tpu-vm 'value(state,networkEndpoints.len())'
  install_workers
  start_workers
  note "every $TPU_POLL seconds until all workers exited 0; exit codes 1 to 4 are final, else up to $TPU_TRIES tries"
  answers any status || true
  fetch_logs
  fetch
  [ "$TPU_DELETE" = never ] || delete_slice
}

farewell() { # however this script ends
  local code=$?
  trap - EXIT
  rm -rf "$TEMP"
  if [ -n "$SLICE" ] && [ -z "$DRY_RUN" ]; then
    say "the slice $TPU_NAME ($TPU_TYPE) is still there, and billed. To delete it:"
    echo "  $(quoted bash "$SCRIPT" delete --name="$TPU_NAME" "${PLACE[@]}")" >&4
  fi
  exit "$code"
}

main() {
  parse "$@"
  [ -n "$COMMAND" ] || { usage >&2; exit 2; }
  settings
  [ -n "$DRY_RUN" ] || command -v gcloud >/dev/null || die "gcloud is not installed. See https://cloud.google.com/sdk/docs/install, or use --dry-run."
  TEMP="$(mktemp -d)"
  trap farewell EXIT
  trap 'say interrupted; exit 130' INT TERM HUP
  case "$COMMAND" in
    install | start | status | stop)
      if [ -z "$DRY_RUN" ]; then
        look
        [ "$STATE" = ready ] || { echo "slice $TPU_NAME: $STATUS"; exit 1; }
      fi
      ;;
  esac
  case "$COMMAND" in
    run) if [ -n "$DRY_RUN" ]; then dry_run; else run; fi ;;
    create) if [ -n "$DRY_RUN" ]; then create_slice; else ensure_slice; fi ;;
    install) install_workers ;;
    start) start_workers ;;
    follow) if [ -n "$DRY_RUN" ]; then answers any status; else follow; fi ;;
    fetch) fetch ;;
    delete) delete_slice ;;
    status) answers any status || true; echo "slice $TPU_NAME: $STATUS"; cut -d' ' -f2- "$TEMP/workers" ;;
    logs) on_workers 0 tail -n 100 -F refusal-jax-job/log ;;
    stop) answers stopped stop || true; cut -d' ' -f2- "$TEMP/workers" ;;
    *) die "$COMMAND is no command; see --help." ;;
  esac
}

main "$@"
