# Signals and the end, for every job. SLURM gives two kinds of notice:
#   USR1  the time limit is near: stop, then ask for another turn;
#   TERM  preempted or cancelled: stop. SLURM itself requeues what it has preempted, so that a job
#         that somebody has cancelled does not come back.
notices=0
requeue=
pids=()

# shellcheck disable=SC2329  # by the traps
stop() {
  notices=$((notices + 1))
  [ ${#pids[@]} -eq 0 ] || kill -TERM "${pids[@]}" 2>/dev/null
}
trap stop TERM INT
trap 'requeue=yes; stop' USR1

# Start a program beside this script; $begun is its number, or empty where it is too late to start.
begin() {
  begun=
  [ "$notices" -eq 0 ] || return 0
  "$@" &
  begun=$!
  pids+=("$begun")
}

# Wait for a program's end and return its code. `wait` also ends where a signal is trapped.
await() {
  local code seen
  [ -n "$1" ] || return 143
  while :; do
    seen=$notices
    wait "$1"
    code=$?
    [ "$notices" -ne "$seen" ] || return "$code"
    kill -0 "$1" 2>/dev/null || break
  done
  wait "$1"
  code=$?
  # Where a program ends in the moment of a notice, bash may have lost its code, and gives these.
  case $code in -1 | 127) code=143 ;; esac
  return "$code"
}

# Leave with a code. What has not ended for lack of time alone is queued again.
finish() {
  if [ -n "$requeue" ] && [ "$1" -ne 0 ]; then
    echo "job $SLURM_JOB_ID: the time limit is near, asking for another turn"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$1"
}
