# shellcheck shell=bash
# Sourced by common.sh and node.sh.

# forward COMMAND...: run it, pass SIGUSR1 and SIGTERM on to it as SIGUSR1 ("stop after this step"),
# and return its exit status. `asked` holds the last signal that came.
# shellcheck disable=SC2034 # common.sh reads it
asked=""
forward() {
    local process status interrupted
    "$@" &
    process=$!
    # shellcheck disable=SC2064 # the process is this one
    trap "asked=USR1 interrupted=1; kill -USR1 $process 2>/dev/null || true" USR1
    # shellcheck disable=SC2064
    trap "asked=TERM interrupted=1; kill -USR1 $process 2>/dev/null || true" TERM
    while true; do
        interrupted=""
        status=0
        # A signal ends `wait` early; waiting again gives the status of the process.
        wait "$process" || status=$?
        [[ -n $interrupted ]] || break
    done
    # What follows (a requeue, a note) is not to be interrupted by a signal that repeats.
    trap 'asked=USR1' USR1
    trap 'asked=TERM' TERM
    return "$status"
}
