# Functions shared by the launch scripts. Sourcing it also selects the Python environment and sets PYTHONPATH.

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

# Use an active environment, else ours if setup.sh has finished it, else the Python on PATH.
if [[ -z ${VIRTUAL_ENV:-} && -f $venv/.sora-setup ]]; then
    enter_venv
fi

# Run this checkout's code from any working directory.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# DeepSpeed compiles ops for this machine's processor, so each machine uses a separate folder.
use_private_extensions() {
    if [[ -z ${TORCH_EXTENSIONS_DIR:-} && -n ${VIRTUAL_ENV:-} ]]; then
        export TORCH_EXTENSIONS_DIR=$VIRTUAL_ENV/torch_extensions/$(uname -n)
    fi
}

# A process that is killed while it compiles an op leaves a lock file, and every later start would silently wait for it.
# A compiling process keeps its lock file open, so a lock file of this user that no process has open is stale.
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

# Print the number of processes for this machine: one per GPU, or two on a CPU.
processes_here() {
    local gpus=0
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        # as in CUDA, a negative number and all entries after it are ignored
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^[[:space:]]*-/,$d' | grep -c '[^[:space:]]' || true)
    elif command -v nvidia-smi >/dev/null; then
        gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    fi
    if ((gpus > 0)); then echo "$gpus"; else echo 2; fi
}

# Limit the CPU threads of a process; by default each would start a thread per core. $1: processes on this machine.
limit_threads() {
    local threads=$(($(nproc) / $1))
    ((threads >= 1)) || threads=1
    ((threads <= 8)) || threads=8
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
}

# Set variables of NCCL, gloo and the allocator, unless they are set already.
network_and_memory() {
    # log NCCL's warnings and errors
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # record the last collectives of every rank, and dump them after a time-out, to show which rank was late
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    # packs differ in size from step to step: expandable segments avoid fragmentation of GPU memory
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
    # the default interface may be that of a management network, or have no route
    if [[ -n ${INTERFACE:-} ]]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
    fi
}

# Create the file in which the training process records its run folder and its exit code: torchrun turns every code into
# 1, and the run folder may be set in a file of conf/. A script that was started by another launch script uses its file.
make_exit_file() {
    if [[ ! -e ${SORA_EXIT_FILE:-} ]]; then # unset, or a file on another machine
        SORA_EXIT_FILE=$(mktemp)
        trap 'rm -f "$SORA_EXIT_FILE"' EXIT
        export SORA_EXIT_FILE
    fi
}

# Print the run's exit code: the one that its process on this machine recorded, else that of exit.json in the run
# folder, if another machine has written it since the start. That is told by comparing the file with its identity before
# the start, not by clocks, since a file server's may differ. $1: the code to print without either.
final_code() {
    local key value code= run_dir= before=
    while IFS=' ' read -r key value; do
        case $key in
            code) code=$value ;;
            run_dir) run_dir=$value ;;
            before) before=$value ;;
        esac
    done < <(cat "$SORA_EXIT_FILE" 2>/dev/null || true)
    if [[ -z $code && -f $run_dir/exit.json && $(exit_mark "$run_dir/exit.json") != "$before" ]]; then
        code=$(tr -d '\n' <"$run_dir/exit.json" | sed -n 's/.*"code"[[:space:]]*:[[:space:]]*\([0-9]\{1,3\}\).*/\1/p')
    fi
    echo "${code:-$1}"
}

# Print the identity of a version of a file: its inode, and its modification time in nanoseconds.
exit_mark() {
    stat -c '%i %.9Y' "$1" | tr -d .
}

# Run a command, forward the first stop signal to it, and wait until it has ended. Sets $status to its code and
# $stopped_by to the name of the signal.
# - The command gets a session of its own: Ctrl-C and `timeout` signal the whole process group, and a signal that reaches
#   torchrun twice or three times cuts the save short. Repeated signals are dropped here for the same reason.
# - Ctrl-C is forwarded as SIGTERM, because a command that a script starts in the background ignores SIGINT.
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
    # 143, 138: the forwarded signal killed it before it installed its handlers, and so before training began
    if [[ -n $stopped_by && ($status == 143 || $status == 138) ]]; then
        status=75
    fi
}

# Explain exit code 75 in one line after torchrun's traceback.
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
    # if the process hasn't started or has ended, there is nothing to stop
    if [[ -n $child ]]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}
