#!/usr/bin/env bash
# Run a script of segmentation/ or detection/ in several processes, one per GPU.
#
#     bash launch.sh SCRIPT PROCESSES [arguments of the script]
#
# PROCESSES is the number of processes on this machine. Environment variables:
#
#     PYTHON        Python interpreter (default: python)
#     MAX_RESTARTS  number of restarts if a process dies (default: 0)
#     PORT          port for the communication of the processes (default: a free one; 29500 on several machines)
#     NNODES        number of machines (default: 1)
#     NODE_RANK     number of this machine, from 0; required on several machines
#     MASTER_ADDR   address of machine 0; required on several machines
set -euo pipefail
case ${1:-} in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;;
esac
[ $# -ge 2 ] || { echo "usage: bash launch.sh SCRIPT PROCESSES [arguments of the script]" >&2; exit 2; }
script=$1 processes=$2
shift 2
[[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "launch.sh: $processes is not a number of processes" >&2; exit 2; }
python=${PYTHON:-python}
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
    { echo "launch.sh: torch is not installed for $python; activate the environment first: source .venv/bin/activate" >&2; exit 1; }
if [ "${NNODES:-1}" -gt 1 ]; then
    rendezvous=(--nnodes="$NNODES" --node_rank="${NODE_RANK:?must be set to the number of this machine, from 0}" \
        --master_addr="${MASTER_ADDR:?must be set to the address of machine 0}" --master_port="${PORT:-29500}")
elif [ "$processes" -eq 1 ]; then
    exec "$python" "$script" "$@"
elif [ -n "${PORT:-}" ]; then
    rendezvous=(--master_port="$PORT")
else
    rendezvous=(--standalone)
fi
exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="$processes" \
    --max-restarts="${MAX_RESTARTS:-0}" --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 "$script" "$@"
