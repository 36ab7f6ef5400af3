# What the launch scripts share. Source it; it does nothing by itself but find the environment.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SORA_VENV:-$root/.venv}

say() { printf '%s\n' "$*" >&2; }

# Print a command in a form that can be pasted into a shell.
show() {
    printf '+' >&2
    printf ' %q' "$@" >&2
    printf '\n' >&2
}

enter_venv() {
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
}

# An active environment is the user's choice. Otherwise take ours, if setup.sh has finished it, or else what is on PATH.
if [[ -z ${VIRTUAL_ENV:-} && -f $venv/.sora-setup ]]; then
    enter_venv
fi

# The checkout's code is what runs, wherever the command is given.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# Ops that DeepSpeed compiles are for this machine's processor, so each machine has its own folder.
use_private_extensions() {
    if [[ -z ${TORCH_EXTENSIONS_DIR:-} && -n ${VIRTUAL_ENV:-} ]]; then
        export TORCH_EXTENSIONS_DIR=$VIRTUAL_ENV/torch_extensions/$(uname -n)
    fi
}

# A start that is killed while an op compiles leaves a lock, and every later start waits for it for ever, without a word.
# The compiling process keeps its lock open: a lock of ours that no process has open is stale.
remove_stale_build_locks() {
    local lock holder
    [[ -n ${TORCH_EXTENSIONS_DIR:-} ]] || return 0
    for lock in "$TORCH_EXTENSIONS_DIR"/*/lock; do
        [[ -O $lock ]] || continue
        holder=$(find /proc/[0-9]*/fd -lname "$(realpath "$lock")" -print -quit 2>/dev/null || true)
        if [[ -z $holder ]]; then
            say "removing the stale build lock $lock"
            rm -f "$lock"
        fi
    done
}

# How many processes this machine should run: one per GPU, or two on a CPU.
processes_here() {
    local gpus=0
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true)
    elif command -v nvidia-smi >/dev/null; then
        gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    fi
    if ((gpus > 0)); then echo "$gpus"; else echo 2; fi
}

# Without a limit every process starts a thread per core, and all together fight over the cores. $1: processes here.
limit_threads() {
    local threads=$(($(nproc) / $1))
    ((threads >= 1)) || threads=1
    ((threads <= 8)) || threads=8
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
}

# What NCCL, gloo and the allocator are told; anything that is set already stays.
network_and_memory() {
    # errors of the network with their reason in the log, and nothing else
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # keep the last collectives of every rank, and write them down when one runs into its time limit: who waits for whom
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    # packs differ from step to step: growing segments keep the GPU's memory from falling into pieces
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
    # the first interface that is found may be a management network, or lead nowhere
    if [[ -n ${INTERFACE:-} ]]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
    fi
}

# The run_dir=... among the arguments, or nothing.
run_dir_of() {
    local argument found=
    for argument in "$@"; do
        case $argument in
            run_dir=* | +run_dir=* | ++run_dir=*) found=${argument#*=} ;;
        esac
    done
    printf '%s' "$found"
}

# Tells one exit.json of run folder $1 from the next. Not by comparing clocks: a file server's differs from ours.
exit_mark() {
    if [[ -n $1 ]]; then stat -c '%i %.Y' "$1/exit.json" 2>/dev/null || true; fi
}

# torchrun turns every code into 1; the run's own code is in exit.json. $1: run folder, $2: its exit_mark before the start,
# $3: the code to use if the run has written no exit.json since.
final_code() {
    local code=
    if [[ -n $1 && -f $1/exit.json && $(exit_mark "$1") != "$2" ]]; then
        code=$(tr -d '\n' <"$1/exit.json" | sed -n 's/.*"code"[[:space:]]*:[[:space:]]*\([0-9]\{1,3\}\).*/\1/p')
    fi
    echo "${code:-$3}"
}

# Run a command, hand the first stop signal on to it, and wait until it has really ended. Leaves its code in $status and
# the name of the signal in $stopped_by.
# - The command gets a session of its own: Ctrl-C and `timeout` signal the whole process group, and a signal that reaches
#   torchrun twice or three times cuts the save short. Repeated signals are dropped here for the same reason.
# - Ctrl-C is handed on as SIGTERM, because a command that a script starts in the background ignores SIGINT.
run_and_forward() {
    child= stopped_by= interrupted=
    trap 'forward TERM' TERM INT HUP
    trap 'forward USR1' USR1
    setsid "$@" &
    child=$!
    while true; do
        interrupted=
        status=0
        wait "$child" || status=$?
        # a trapped signal ends `wait` early, while the command is still saving
        [[ -n $interrupted ]] || break
    done
    trap - TERM INT HUP USR1
    # 143, 138: it died of our signal before it could handle it, so before it had begun
    if [[ -n $stopped_by && ($status == 143 || $status == 138) ]]; then
        status=75
    fi
}

# After torchrun's traceback, say in one line what a stop means.
explain() {
    if [[ $1 == 75 ]]; then say "stopped: give the same command again to go on"; fi
}

forward() {
    interrupted=yes
    if [[ -n $stopped_by ]]; then
        say "already stopping; the save is under way"
        return 0
    fi
    stopped_by=$1
    say "got a stop signal: handing SIG$1 on and waiting for the save"
    # no process yet, or no more: nothing to stop
    if [[ -n $child ]]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}
