#!/bin/sh
# What a GPU shows, in under eight minutes: its tests, then speed and memory of teachers, extraction, codec and training.
#
#   sh benchmarks/gpu.sh OUT [--device cpu] [--small]
#
# Needs torch, timm and the wheels that dtpipe imports without Ray (a folder of them: WHEELS=DIR); nothing is installed
# into the Python that runs it. JSON and logs go to OUT, and OUT/steps.tsv says how each step ended: one that fails or
# takes too long ends alone. --device cpu --small proves the script where no GPU is.
set -u
[ $# -ge 1 ] || { echo "usage: sh benchmarks/gpu.sh OUT [--device cpu] [--small]" >&2; exit 2; }
out=$1; shift
device=cuda small= patience=1
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2; [ "$device" = cuda ] || patience=10 ;;
        --small) small=1; shift ;;
        *) echo "unknown argument $1; usage: sh benchmarks/gpu.sh OUT [--device cpu] [--small]" >&2; exit 2 ;;
    esac
done
mkdir -p "$out" || exit 8
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD/.dev${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --target "$work/site" "$WHEELS"/*.whl || exit 6
    export PYTHONPATH="$PYTHONPATH:$work/site"
fi
"$python" - "$device" <<'CHECK' || exit 6
import sys
try:
    import torch, timm, dtpipe.extract.run, dtpipe.distill.trainer
except ImportError as error:
    sys.exit(f"{error}; give its wheel in the folder WHEELS, or install it")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("torch sees no GPU here; --device cpu --small proves the script without one")
CHECK

: > "$out/steps.tsv"
failed=0
step() {  # step NAME SECONDS COMMAND..: run it with its output in a log; say how it ended
    name=$1 limit=$(($2 * patience)); shift 2
    started=$(date +%s)
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    rc=$?
    [ $rc -eq 0 ] || failed=1
    printf '%s\t%s\t%s s\n' "$name" "$rc" "$(($(date +%s) - started))" | tee -a "$out/steps.tsv"
    [ $rc -eq 0 ] || tail -n 5 "$out/$name.log"
}

if "$python" -c 'import pytest' 2> /dev/null; then
    # shellcheck disable=SC2046  # a list of files
    step tests 90 "$python" -m pytest -q -m gpu -W default -p no:cacheprovider $(grep -rl 'mark\.gpu' tests)
fi
if [ -n "$small" ]; then
    seconds=1 teachers="--small" steps="--num-images 64 --steps 2 --live-steps 1 --repeats 1 --forms rans"
else
    seconds=5 teachers="" steps="--num-images 2048 --batch-size 256 --steps 20 --live-steps 5 --repeats 3 --forms rans"
fi
# shellcheck disable=SC2086  # settings are several words
{
    step extract 90 "$python" benchmarks/extract.py --only ratio,cores,written --device "$device" ${small:+--small} \
        --seconds "$seconds" --teacher pipeline/demo/teacher --out-json "$out/extract.json"
    step codec 45 "$python" benchmarks/codec.py --device "$device" --limit 64 --out-json "$out/codec.json"
    step distill_step 75 "$python" benchmarks/distill_step.py --device "$device" $steps --work "$work/distill_step" \
        --teacher demo=pipeline/demo/teacher --out-json "$out/distill_step.json"
    step gpu_teachers 210 "$python" benchmarks/gpu_teachers.py --device "$device" $teachers --work "$work/teachers" \
        --out-json "$out/gpu_teachers.json"
}
exit $failed
