#!/usr/bin/env bash
# Train a detector on several GPUs (or CPU processes) of this machine: bash dist_train.sh CONFIG GPUS [options]
# The options are those of train.py; see dense/launch.sh for several machines.
here=$(dirname "${BASH_SOURCE[0]}")
[ "${1:-}" != --help ] || exec bash "$here/../dense/launch.sh" "$here/train.py" 1 --help
[ $# -ge 2 ] || { echo "usage: bash dist_train.sh CONFIG GPUS [options of train.py]" >&2; exit 2; }
exec bash "$here/../dense/launch.sh" "$here/train.py" "$2" "$1" "${@:3}"
