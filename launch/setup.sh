#!/usr/bin/env bash
# Make the Python environment in .venv: PyTorch, DeepSpeed, this package, and the tools for its tests.
#
#   ./launch/setup.sh
#
# Safe to call at any time: it returns at once if there is nothing to do, waits for another call that is running, and
# rebuilds an environment that an earlier call could not finish.
#   SORA_PYTHON  the interpreter to use, 3.11 or newer (python3)
#   SORA_VENV    where to put the environment (.venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${SORA_PYTHON:-python3}
venv=${SORA_VENV:-$PWD/.venv}
stamp=$venv/.sora-setup           # hash of the inputs of the finished environment
unfinished=$venv/.sora-unfinished # exists while the environment is being built

# The path is part of the hash, because an environment contains absolute paths and can't be moved.
wanted=$( (echo "$PWD $venv" && cat pyproject.toml constraints.txt) | sha256sum)
up_to_date() { [[ -f $stamp && $(<"$stamp") == "$wanted" && -x $venv/bin/python ]]; }

if up_to_date; then exit 0; fi

if [[ $(command -v "$python") == "$venv"/* ]]; then # the environment's own Python, which may be removed below
    python=$("$python" -c 'import sys; print(sys._base_executable)')
fi
if ! command -v "$python" >/dev/null; then
    echo "error: there is no $python; install Python 3.11 or newer, or name one with SORA_PYTHON=..." >&2
    exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is $("$python" --version 2>&1); 3.11 or newer is needed: name one with SORA_PYTHON=..." >&2
    exit 2
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "error: $python cannot make environments; on Debian and Ubuntu, install python3-venv" >&2
    exit 2
fi

mkdir -p "$venv"
exec 9>"$venv/.sora-lock"
if ! flock --nonblock 9; then
    echo "another setup is at work on $venv; waiting for it" >&2
    flock 9
fi
if up_to_date; then exit 0; fi

run() {
    printf '+' >&2
    printf ' %q' "$@" >&2
    printf '\n' >&2
    "$@"
}

# A killed pip can leave a partial package that seems complete. Delete everything except the two marker files.
if [[ -f $unfinished ]]; then
    echo "$venv was left unfinished; making it anew" >&2
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .sora-lock ! -name "$(basename "$unfinished")" -exec rm -rf {} +
fi
touch "$unfinished"
rm -f "$stamp"

[[ -x $venv/bin/python ]] || run "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)

# Install PyTorch first and alone, so that later installs keep its build (CPU or CUDA).
run "${pip[@]}" torch setuptools wheel

# On a CPU, DeepSpeed compiles one op at the first start. Build it into the package here: the first start is then quick,
# and a start that is killed cannot leave a build lock behind. The build finds torch only without build isolation, and
# pip's cache may have a build without the op. Without a compiler, or with a GPU, DeepSpeed is installed without the op.
deepspeed_with_op() {
    run env DS_BUILD_SHM_COMM=1 "${pip[@]}" ninja psutil py-cpuinfo packaging numpy &&
        run env DS_BUILD_SHM_COMM=1 "${pip[@]}" --no-build-isolation --no-cache-dir deepspeed
}
if command -v c++ >/dev/null && ! command -v nvidia-smi >/dev/null; then
    deepspeed_with_op || echo "warning: DeepSpeed's CPU op did not build; it is tried again at the first start" >&2
fi

run "${pip[@]}" --editable '.[dev,dash,eval,models,docs,curate,release,serve]'

echo "$wanted" >"$stamp"
rm -f "$unfinished"
echo "the environment is ready: source $venv/bin/activate" >&2
