#!/usr/bin/env bash
# Train on this machine.
#
#   ./launch/torchrun.sh [NPROC=2] [MAX_RESTARTS=3] experiment=demo run_dir=runs/demo key=value ...
#
# The settings can also be environment variables:
#   NPROC             processes (one per GPU, or 2 on a CPU)
#   MAX_RESTARTS      restarts after a failure (0); a wrong configuration is never tried again
#   SHUTDOWN_TIMEOUT  seconds for the save after a stop signal (300)
#   SORA_RUN_ID       a name for this launch, the same in all processes
#
# Stop it with Ctrl-C, SIGTERM or SIGUSR1: it saves and exits with 75; the same command resumes it.
# Exit codes: 0 done, 2 wrong configuration or input, 75 stopped after saving, 1 anything else.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while [[ ${1:-} =~ ^(NPROC|MAX_RESTARTS|SHUTDOWN_TIMEOUT|SORA_RUN_ID)= ]]; do
    export "${1?}"
    shift
done
processes=${NPROC:-$(processes_here)}
limit_threads "$processes"
network_and_memory
use_private_extensions
export SORA_RUN_ID=${SORA_RUN_ID:-$(date -u +%Y%m%d-%H%M%S)-$$}
make_exit_file

# We restart here instead of torchrun, which would restart a wrong configuration too.
# The rendezvous is at localhost, since a machine may be unable to resolve its own name.
command=(torchrun --standalone --local-addr localhost --nproc-per-node "$processes" --max-restarts 0
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "${SHUTDOWN_TIMEOUT:-300}"
    -m sora_train.train "$@")

restarts=0
while true; do
    remove_stale_build_locks
    : >"$SORA_EXIT_FILE"
    export SORA_RESTARTS=$restarts # restarts without a new checkpoint end with code 2 after a few
    show "${command[@]}"
    run_and_forward "${command[@]}"
    code=$(final_code "$status")
    if [[ $code == 0 || $code == 2 || $code == 75 || -n $stopped_by ]]; then break; fi
    if ((restarts >= ${MAX_RESTARTS:-0})); then break; fi
    restarts=$((restarts + 1))
    say "the run ended with code $code: restart $restarts of $MAX_RESTARTS"
done
explain "$code"
exit "$code"
