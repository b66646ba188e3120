# shellcheck shell=bash
# Sourced by common.sh and node.sh.

# shellcheck disable=SC2034 # common.sh reads it
asked=""
# A pipe that never has data: `read -t` on it sleeps without a process.
exec {idle}<> <(:)

# forward COMMAND...: run it, pass SIGUSR1 and SIGTERM on to it as SIGUSR1 ("stop after this step"),
# and return its exit status. `asked` holds the last signal received.
forward() {
    local process status=0
    "$@" &
    process=$!
    # shellcheck disable=SC2064 # the process is this one
    trap "asked=USR1; kill -USR1 $process 2>/dev/null || true" USR1
    # shellcheck disable=SC2064
    trap "asked=TERM; kill -USR1 $process 2>/dev/null || true" TERM
    # `wait` comes last: bash 5.2 was seen to wait forever for a process that ended at the same
    # moment as a signal interrupted the waiting.
    while kill -0 "$process" 2>/dev/null; do
        read -r -t 0.5 -u "$idle" || true
    done
    wait "$process" || status=$?
    # The following actions (a requeue, a note) must not be interrupted by a repeated signal.
    trap 'asked=USR1' USR1
    trap 'asked=TERM' TERM
    return "$status"
}
