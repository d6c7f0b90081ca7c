#!/usr/bin/env bash
# Run a script of segmentation/ or detection/ in several processes, one per GPU.
#
#     bash launch.sh SCRIPT PROCESSES [arguments of the script]
#
# Environment variables, with their defaults: PYTHON (python), the interpreter; MAX_RESTARTS (0), the number of times
# that failed processes are restarted. For several machines: NNODES, their number; NODE_RANK, the number of this one, from
# 0; MASTER_ADDR, the address of the first; PORT (29500).
set -euo pipefail
script=$1 processes=$2
shift 2
[[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "launch.sh: $processes is not a number of processes" >&2; exit 2; }
python=${PYTHON:-python}
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
    { echo "launch.sh: $python has no torch; activate the environment first: source .venv/bin/activate" >&2; exit 1; }
if [ "${NNODES:-1}" -gt 1 ]; then
    rendezvous=(--nnodes="$NNODES" --node_rank="${NODE_RANK:?is the number of this machine, from 0}" \
        --master_addr="${MASTER_ADDR:?is the address of the first machine}" --master_port="${PORT:-29500}")
elif [ "$processes" -eq 1 ]; then
    exec "$python" "$script" "$@"
else
    rendezvous=(${PORT:+--master_port="$PORT"})
    [ ${#rendezvous[@]} -gt 0 ] || rendezvous=(--standalone)
fi
exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="$processes" \
    --max-restarts="${MAX_RESTARTS:-0}" --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 "$script" "$@"
