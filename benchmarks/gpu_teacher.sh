#!/bin/sh
# A teacher in eight minutes on one GPU: a DDPM of 64 px in bfloat16, on photographs, then on digit scenes.
#
#   sh benchmarks/gpu_teacher.sh OUT PHOTOS [--device cpu] [--small]
#
# PHOTOS is a folder, zip or tar of images. OUT/photos and OUT/digits are teachers for `dtpipe extract --teacher`: float16
# weights under 20 MB, samples.png and train.json. Kept ones belong into benchmarks/weights/. Needs what gpu.sh needs;
# the same command goes on where it was stopped.
set -u
usage="usage: sh benchmarks/gpu_teacher.sh OUT PHOTOS [--device cpu] [--small]"
[ $# -ge 2 ] || { echo "$usage" >&2; exit 2; }
out=$1 photos=$2; shift 2
device=cuda hours=0.062 sets=""
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --small) hours=0.01 sets="--limit 64 --steps 4 -s train_teacher.run.sample_steps=5"; shift ;;
        *) echo "unknown argument $1; $usage" >&2; exit 2 ;;
    esac
done
case $photos in /* | *://*) ;; *) photos=$PWD/$photos ;; esac
mkdir -p "$out" || exit 8
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/.dev${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --target "$out/site" "$WHEELS"/*.whl || exit 6
    export PYTHONPATH="$PYTHONPATH:$out/site"
fi
scenes=$out/scenes
[ -d "$scenes/images" ] || "$python" -c \
    'import sys; from dtpipe.pipeline.demo.scenes import write_scenes; write_scenes(sys.argv[1], int(sys.argv[2]), seed=0)' \
    "$scenes" "$([ -n "$sets" ] && echo 64 || echo 6000)" || exit 1

train() {  # train NAME IMAGES: 9.7 M parameters, 19 MB in float16
    # shellcheck disable=SC2086  # settings are several words
    "$python" -m dtpipe.pipeline.cli.main train-teacher --images "$2" --out "$out/$1" --px 64 \
        --channels 16,48,96,160,160,160 --attention-strides 8,16 --precision bfloat16 --batch-size 128 --lr 4e-4 \
        -s train_teacher.blocks=1 -s train_teacher.head_channels=32 -s train_teacher.norm_groups=16 \
        -s train_teacher.ema_decay=0.999 --steps 200000 --max-hours "$hours" --dtype float16 --device "$device" $sets
    rc=$?  # 5: time is up and the teacher is written, which is what --max-hours is for
    [ $rc -eq 0 ] || [ $rc -eq 5 ] || exit $rc
}
train photos "$photos"
train digits "$scenes/images"
du -h "$out"/*/unet/*.safetensors
