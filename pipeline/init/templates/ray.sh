#!/bin/bash
# Run with: RAY_API_SERVER_ADDRESS=http://HEAD:8265 bash {{ ray }}
# Submits extraction and training to a Ray cluster whose nodes have dtpipe. All of them must reach the images, the teacher and the features:
# on a disk that they share, or behind URLs (s3://..). This folder must be on such a disk. Submitted again, it goes on where it stopped.
set -eu

step() {
    ray job submit -- env RAY_ADDRESS=auto "$@"
}

step dtpipe extract -c {{ config }}
step dtpipe verify {{ features_word }}
step dtpipe distill -c {{ config }} --train-workers {{ gpus }}
