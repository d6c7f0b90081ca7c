#!/usr/bin/env bash
# Train a detector on several GPUs (or CPU processes) of this machine: bash dist_train.sh CONFIG GPUS [options]
# The options are those of train.py; launch.sh tells about several machines.
[ $# -ge 2 ] || { echo "usage: bash dist_train.sh CONFIG GPUS [options of train.py]" >&2; exit 2; }
here=$(dirname "${BASH_SOURCE[0]}")
exec bash "$here/../launch.sh" "$here/train.py" "$2" "$1" "${@:3}"
