#!/usr/bin/env bash
# Train on several machines. Start it on each of them with the same settings:
#
#   NNODES=4 MASTER_ADDR=node-0 RUN_ID=first-try ./launch/multinode.sh experiment=... run_dir=/shared/runs/x key=value ...
#
#   NNODES            number of machines; 2:4 lets the run start with two and take up to four
#   MASTER_ADDR       one of the machines, by a name or address that all can reach
#   MASTER_PORT       a free port on it (20000 to 29999, computed from RUN_ID, so that two runs may share a machine)
#   RUN_ID            a name for this launch, the same on all machines, another one for the next launch
#   MAX_RESTARTS      restarts of all processes after a failure, or after a machine has left or joined (0)
#   NPROC             processes per machine (one per GPU, or 2 on a CPU)
#   LOCAL_ADDR        this machine's address, if the others can't resolve its host name
#   INTERFACE         network interface, e.g. eth0, if the one that is found by default is wrong
#   SHUTDOWN_TIMEOUT  seconds for the save after a stop signal (300)
#
# run_dir must be in a folder that all machines share. Exit codes are those of torchrun.sh. It is enough to send a stop
# signal to one machine. On Slurm use slurm.sbatch, which calls this script.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for setting in NNODES MASTER_ADDR RUN_ID; do
    if [[ -z ${!setting:-} ]]; then
        say "error: $setting is not set; the head of $0 says what it means"
        exit 2
    fi
done
processes=${NPROC:-$(processes_here)}
limit_threads "$processes"
network_and_memory
# By default torchrun's agents reuse the store of their first rendezvous, whose address isn't announced again. A machine
# that rejoins would wait for that address until the run ends with a time-out.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
use_private_extensions
remove_stale_build_locks
export SORA_RUN_ID=$RUN_ID
MASTER_PORT=${MASTER_PORT:-$((20000 + $(cksum <<<"$RUN_ID" | cut -d ' ' -f 1) % 10000))}
make_exit_file
: >"$SORA_EXIT_FILE"

command=(torchrun --nnodes "$NNODES" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-0}"
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$RUN_ID"
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"}
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "${SHUTDOWN_TIMEOUT:-300}"
    -m sora_train.train "$@")

show "${command[@]}"
run_and_forward "${command[@]}"
code=$(final_code "$status")
explain "$code"
exit "$code"
