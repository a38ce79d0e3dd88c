#!/usr/bin/env bash
# Make the environment and run the tests; arguments go to pytest, for example: ./test.sh -k recompute
# With other versions: VENV=.venv-oldest CONSTRAINTS=scripts/oldest.txt ./test.sh tests/ops
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/environment.sh
make_environment train,export,dev "${CONSTRAINTS:-/dev/null}"
# Two tests side by side on two cores; more threads in each would only fight. Each process takes tests that follow each
# other, so that the fixtures of a file are made once, and at the end some of those that the other has left.
export OMP_NUM_THREADS=1
exec "$python" -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@"
