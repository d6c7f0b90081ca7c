#!/usr/bin/env bash
# Evaluate weights on several GPUs or CPU processes of this machine: bash dist_test.sh CONFIG CHECKPOINT GPUS [options]
# GPUS is the number of processes. The options are those of test.py. For several machines see dense/launch.sh.
here=$(dirname "${BASH_SOURCE[0]}")
[[ ${1:-} =~ ^(-h|--help)$ ]] && exec bash "$here/../dense/launch.sh" "$here/test.py" 1 --help
[ $# -ge 3 ] || { echo "usage: bash dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]" >&2; exit 2; }
exec bash "$here/../dense/launch.sh" "$here/test.py" "$3" "$1" "$2" "${@:4}"
