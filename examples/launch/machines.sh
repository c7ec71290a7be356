#!/usr/bin/env bash
# PyTorch on several machines. Run it on each of them, with the name of the first one: HOST=first ./machines.sh
set -euo pipefail
torchrun --nnodes "${MACHINES:-4}" --nproc-per-node "${GPUS:-8}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "${JOB:-polus}" --rdzv-endpoint "$HOST:29500" several_devices.py
