#!/usr/bin/env bash
# PyTorch on one machine: a process for each GPU. JAX needs no launcher: `python several_devices.py`.
set -euo pipefail
torchrun --standalone --nproc-per-node "${GPUS:-8}" --max-restarts 3 several_devices.py
