"""Starts the example by Ray Train: 32 processes with a GPU each, started again after a failure.

python examples/launch/ray_train.py
"""

import runpy

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train_loop() -> None:
    # Ray has set up torch.distributed; the example takes the process group that it finds.
    runpy.run_path("examples/several_devices.py", run_name="__main__")


if __name__ == "__main__":
    TorchTrainer(
        train_loop,
        scaling_config=ScalingConfig(num_workers=32, use_gpu=True),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=10)),
    ).fit()
