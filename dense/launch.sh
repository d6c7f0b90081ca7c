#!/usr/bin/env bash
# Run a script of segmentation/ or detection/ on several processes, one for each GPU.
#
#     bash launch.sh SCRIPT PROCESSES [arguments of the script]
#
# Environment: PYTHON, the interpreter (python). For several machines NNODES, NODE_RANK (0 on the first), MASTER_ADDR,
# the address of the first, and PORT (29500). MAX_RESTARTS (0): how often dead processes are started again.
set -euo pipefail
script=$1 processes=$2
shift 2
[[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "launch.sh: $processes is no number of processes" >&2; exit 2; }
python=${PYTHON:-python}
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
    { echo "launch.sh: $python has no torch; activate the environment first: source .venv/bin/activate" >&2; exit 1; }
if [ "${NNODES:-1}" -gt 1 ]; then
    meeting=(--nnodes="$NNODES" --node_rank="${NODE_RANK:?is the number of this machine, from 0}" \
        --master_addr="${MASTER_ADDR:?is the address of the first machine}" --master_port="${PORT:-29500}")
elif [ "$processes" -eq 1 ]; then
    exec "$python" "$script" "$@"
else
    meeting=(${PORT:+--master_port="$PORT"})
    [ ${#meeting[@]} -gt 0 ] || meeting=(--standalone)
fi
exec "$python" -m torch.distributed.run "${meeting[@]}" --nproc_per_node="$processes" \
    --max-restarts="${MAX_RESTARTS:-0}" --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 "$script" "$@"
