#!/usr/bin/env bash
# Set up, then lint, check the types, and run the tests. Arguments go to pytest:
#
#   ./launch/test.sh [-k NAME] [-n 4] [--campaign] ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

./launch/setup.sh
enter_venv
use_private_extensions
remove_stale_build_locks
limit_threads 2                            # the multi-rank tests run two ranks
export WANDB_MODE=${WANDB_MODE:-offline} # tests must not wait for a server

run() {
    show "$@"
    "$@"
}
run ruff check .
run mypy
run pytest -q -n 2 --dist worksteal "$@" # two processes, unless the arguments have another -n
