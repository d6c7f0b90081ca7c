#!/usr/bin/env bash
# What wants a GPU, in ten minutes: tests, tables and profiles, as text, JSON and pictures in a folder.
#
#     bash benchmarks/run_on_gpu.sh FOLDER        # needs the packages of requirements-dev.txt and requirements-extra.txt
#     bash benchmarks/run_on_gpu.sh FOLDER dry    # each command on a CPU, with tiny networks: do they run?
set -uo pipefail
usage="usage: bash benchmarks/run_on_gpu.sh FOLDER [dry]"
folder=$(realpath -m "${1:?$usage}")
[ "${2:-dry}" = dry ] || { echo "$usage" >&2; exit 2; }
mkdir -p "$folder" || exit 1
cd "$(dirname "$0")/.." || exit 1
svt=alt_gvt_small pcpvt=pcpvt_small
size="--batch-size 128" throughput=() segmentor=upernet_alt_gvt_s_512x512_160k_ade20k_swin_setting
detectors="retinanet_alt_gvt_s_fpn_1x_coco_pvt_setting mask_rcnn_alt_gvt_s_fpn_1x_coco_pvt_setting"
device="--device cuda" peer="--compare timm" compile=--compile
if [ "${2:-}" = dry ]; then
    svt=alt_gvt_tiny pcpvt=pcpvt_tiny
    size="--batch-size 2 --turns 1" throughput=(--batch-size 2 --turns 1 alt_gvt_tiny regnety_002) segmentor=upernet_alt_gvt_tiny_shapes
    detectors="retinanet_alt_gvt_tiny_shapes mask_rcnn_alt_gvt_tiny_shapes"
    device="--device cpu" peer="" compile=""
    export TWINS_TEST_DEVICE=cpu
fi
failed=()

run() { # NAME COMMAND...: run a command with its output in NAME.txt
    echo "== ${*:2}"
    timeout 600 "${@:2}" 2>&1 | tee "$folder/$1.txt" | tail -n 12
    [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$1")
}

run tests python -m pytest -m cuda tests
run throughput python -m benchmarks.throughput $device ${throughput[@]+"${throughput[@]}"} --json "$folder/throughput.json" \
    --picture "$folder/throughput.png"
for mode in eager compiled; do
    option=$([ $mode = compiled ] && echo "$compile")
    run training_$mode python -m benchmarks.models $svt $pcpvt $size $device $peer $option --mode training --amp bf16 \
        --json "$folder/training_$mode.json"
done
run segmentation python -m benchmarks.dense segmentation $device --time segmentation/configs/$segmentor.py
for detector in $detectors; do
    run $detector python -m benchmarks.dense detection $device --time detection/configs/$detector.py
done
for model in $svt $pcpvt; do
    run profile_$model python -m benchmarks.models $model $size $device --mode training --amp bf16 \
        --profile "$folder/profile_$model.table.txt"
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
echo "all written to $folder"
