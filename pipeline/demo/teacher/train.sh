#!/bin/sh
# Train the demo's teacher again: sh train.sh [DTPIPE] [OUT]. A stopped run goes on where it was.
set -eu
dtpipe=${1:-dtpipe}
out=${2:-demo-out/teacher}
here=$(dirname "$0")
python=$(dirname "$(command -v "$dtpipe")")/python
"$python" -c 'import sys; from dtpipe.pipeline.demo.scenes import write_scenes; write_scenes(sys.argv[1], 6000, seed=0)' "$out-scenes"
"$dtpipe" train-teacher -c "$here/train.yaml" --images "$out-scenes/images" --out "$out"
echo "to ship it: cp -r $out/unet $out/scheduler $out/model_index.json $out/train.json $out/train_images.blake3 $out/samples.png $here/"
