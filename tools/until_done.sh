#!/usr/bin/env bash
# Repeats a run until it is finished: bash tools/until_done.sh [--once] --config=... --workdir=DIR ...
#
# A run that was told to stop saves and exits with 0 like a finished one, so a scheduler that looks at
# the status alone would not start it again. Finished is a run that has written WORKDIR/model.
# SIGTERM and Ctrl-C go on to the run, and nothing is started after them. Status: 0 when finished; 2
# for a mistake in flags, config or data, which no repetition mends; 75 when stopped before the end.
# --once starts the run only once, for schedulers that repeat by themselves what ends with 75; a run
# that failed keeps its status, for them to count.
set -u
once="" stopped="" child="" workdir="" pause=10
if [ "${1:-}" = --once ]; then once=1; shift; fi
before=""
for flag in "$@"; do
    case $flag in --workdir=*) workdir=${flag#--workdir=} ;; esac
    if [ "$before" = --workdir ]; then workdir=$flag; fi
    before=$flag
done
if [ -z "$workdir" ]; then
    echo "error: --workdir=DIR is missing; expected the flags of main.py" >&2
    exit 2
fi
written() {
    # On a network file system it may take a minute to see what another host has written.
    local tries=0
    until [ -e "$workdir/model/model.json" ]; do
        if [ -n "$stopped" ] || [ $((tries += 1)) -gt 45 ]; then return 1; fi
        sleep 2
    done
}
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
while true; do
    began=$SECONDS
    python "$(dirname "$0")/../main.py" "$@" &
    child=$!
    wait "$child"
    status=$?
    while kill -0 "$child" 2>/dev/null; do  # a trapped signal ends the wait, not the run
        wait "$child"
        status=$?
    done
    child=""
    if [ $status -eq 0 ] && written; then exit 0; fi
    if [ $status -eq 2 ]; then exit 2; fi
    if [ -n "$stopped" ]; then exit 75; fi
    if [ -n "$once" ]; then exit $((status == 0 ? 75 : status)); fi
    # What fails at once, again and again, waits longer and longer.
    if [ $((SECONDS - began)) -gt 120 ]; then pause=10; fi
    echo "The run ended with status $status before its end; again in $pause s." >&2
    sleep "$pause" &
    wait $!
    if [ -n "$stopped" ]; then exit 75; fi
    pause=$((pause < 300 ? 2 * pause : 600))
done
