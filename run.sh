#!/usr/bin/env bash
# Train a DenseNet.
#
#   ./run.sh                              the digits, on what is there
#   ./run.sh cpu configs/digits.yaml      on the CPU
#   ./run.sh 0,1,2,3 config.yaml          on these GPUs
#
# Anything behind these two goes to `efficient-densenet fit`, for example: --trainer.max_epochs 5, or
# --ckpt_path last to go on from the last checkpoint of a run that was stopped.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/environment.sh

case "${1:-}" in
-h | --help)
    sed -n '2,9s/^# \{0,1\}//p' run.sh
    exit 0
    ;;
esac
devices=${1:-auto}
config=${2:-configs/digits.yaml}
shift $(($# < 2 ? $# : 2))

case $devices in
auto) trainer=(--trainer.accelerator auto --trainer.devices 1) ;;
cpu) trainer=(--trainer.accelerator cpu --trainer.devices 1) ;;
*[!0-9,]* | '') die "DEVICES must be cpu, auto, or GPU numbers such as 0,1,2,3, not: $devices" ;;
*,*) trainer=(--trainer.accelerator gpu --trainer.devices "${devices%,}") ;;
# A lone number would be read as a count: the comma makes it the number of a GPU.
*) trainer=(--trainer.accelerator gpu --trainer.devices "$devices,") ;;
esac
if [ ! -f "$config" ]; then
    case $config in /*) ;; *) config=$called_from/$config ;; esac
    [ -f "$config" ] || die "there is no configuration file $config; those that come along are: $(echo configs/*.yaml)"
fi

make_environment train
exec "$python" -m efficient_densenet fit --config "$config" "${trainer[@]}" "$@"
