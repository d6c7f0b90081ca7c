#!/usr/bin/env bash
# Train an experiment on several GPUs or CPU processes of this machine: bash dist_train.sh CONFIG GPUS [options]
# GPUS is the number of processes. The options are those of train.py. For several machines see dense/launch.sh.
here=$(dirname "${BASH_SOURCE[0]}")
[[ ${1:-} =~ ^(-h|--help)$ ]] && exec bash "$here/../dense/launch.sh" "$here/train.py" 1 --help
[ $# -ge 2 ] || { echo "usage: bash dist_train.sh CONFIG GPUS [options of train.py]" >&2; exit 2; }
exec bash "$here/../dense/launch.sh" "$here/train.py" "$2" "$1" "${@:3}"
