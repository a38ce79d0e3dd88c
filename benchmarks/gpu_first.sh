#!/usr/bin/env bash
# The first hours of the Triton kernels on a GPU: three calls of under ten minutes, in the order of their worth.
#
#   benchmarks/gpu_first.sh 1 FOLDER    # are they right? race test, tests, compute-sanitizer, speed of kernels
#   benchmarks/gpu_first.sh 2 FOLDER    # how fast? kernels, and L = 40, k = 12
#   benchmarks/gpu_first.sh 3 FOLDER    # DenseNet-121 at 224 in bfloat16
#
# Nothing needs to be installed but PyTorch, Triton and pytest; torchvision and timm for the contenders of that name.
# Results go to FOLDER, beside those that exist there. The code is 0 if every step was.
# QUICK=1 makes everything tiny, to try this program. Tests run on real kernels, never in Triton's interpreter, which in
# Triton 3.6 fails with numpy 2.4 and newer.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
call="${1:-}" folder="${2:-}"
if [[ ! "$call" =~ ^[123]$ || -z "$folder" ]]; then
    echo "usage: benchmarks/gpu_first.sh 1|2|3 FOLDER" >&2
    exit 2
fi
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export EFFICIENT_DENSENET_GPU=trust  # the kernels themselves are looked at, whatever was found out before
quick=() chosen="" code=0
if [[ -n "${QUICK:-}" ]]; then
    quick=(--quick) chosen="head and 13 and ieee"
fi

step() { # name, seconds, command
    local name="$1" seconds="$2" result
    shift 2
    echo "== $name: $*"
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$folder/$name.log"
    result="${PIPESTATUS[0]}"
    echo "== $name ended with $result" | tee -a "$folder/$name.log"
    if [[ "$result" != 0 ]]; then code=1; fi
}

tests=(python -m pytest -q -m gpu -p no:cacheprovider tests/ops/test_ops_triton_gpu.py tests/ops/test_triton_steps_gpu.py)
case "$call" in
1)
    step race 190 python benchmarks/gpu_race.py "${quick[@]}" --output "$folder"
    side_by_side=()
    workers="${TEST_WORKERS:-8}"
    if [[ "$workers" != 0 ]] && python -c "import xdist" 2>/dev/null; then side_by_side=(-n "$workers"); fi
    step tests 200 "${tests[@]}" "${side_by_side[@]}" -k "$chosen"
    if command -v compute-sanitizer >/dev/null; then
        # Its memcheck is known to complain about products of warp groups without reason.
        step memcheck 100 compute-sanitizer --tool memcheck "${tests[@]}" -k "${chosen:-reference and 13 and bfloat16}"
    else
        echo "compute-sanitizer is not there: not run" | tee "$folder/memcheck.log"
    fi
    step kernels 80 python benchmarks/gpu.py --quick --sections kernels --minutes 1 --output "$folder"
    ;;
2) step speed 590 python benchmarks/gpu.py "${quick[@]}" --sections kernels L40 --minutes 9 --output "$folder" ;;
3) step densenet121 590 python benchmarks/gpu.py "${quick[@]}" --sections DenseNet-121 --minutes 9 --output "$folder" ;;
esac
exit "$code"
