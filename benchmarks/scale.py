"""Computes where data-parallel training loses time as devices are added: not a measurement.

python benchmarks/scale.py --parameters 1e9 --devices 8 64 1024

Rates of the hardware are assumptions, given as options. The costs of the loop are measured: see
docs/benchmarks/speed.md and resilience.md.

- Gradients are summed by a ring all-reduce: each device sends and receives 2 (N - 1) / N times
  their bytes (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002).
- A step computes 6 operations for each parameter and example or token (Kaplan et al. 2020,
  arXiv:2001.08361).
- The best time between checkpoints is sqrt(2 x pause x time between failures) (Young 1974,
  doi:10.1145/361147.361115).
"""

import argparse
import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Costs:
    """What is assumed. Rates are per device unless they say otherwise.

    Attributes:
        parameters: Trained parameters.
        tokens: Examples or tokens of a step on each device.
        operations: Floating-point operations per second that a step reaches.
        gradient_bytes: Of each parameter's gradient, as it is sent.
        state_bytes: Of each parameter in a checkpoint: float32 weight and two slots of Adam.
        within: Bytes per second between devices of a machine.
        between: Bytes per second between machines.
        per_machine: Devices of a machine.
        latency_secs: Of a message.
        hidden: The share of the compute time behind which the all-reduce can run: the backward
            pass is two thirds; 0 where it only begins after it.
        loop_secs: Python of a call of the backend.
        copy_rate: Bytes per second at which the loop waits for the copy of a checkpoint.
        write_rate: Bytes per second of one writer, checksums and reading back included.
        device_failure_hours: Mean time between failures of a device.
        start_secs: Start-up, compilation included.
    """

    parameters: float = 1e9
    tokens: float = 8192
    operations: float = 4e14
    gradient_bytes: float = 2
    state_bytes: float = 12
    within: float = 3e11
    between: float = 4.5e10
    per_machine: int = 8
    latency_secs: float = 1e-5
    hidden: float = 2 / 3
    loop_secs: float = 2e-3
    copy_rate: float = 5.4e9
    write_rate: float = 3.1e8
    device_failure_hours: float = 50_000
    start_secs: float = 60


def compute_secs(costs: Costs) -> float:
    """Returns the seconds that a device computes in a step."""
    return 6 * costs.parameters * costs.tokens / costs.operations


def all_reduce_secs(costs: Costs, devices: int) -> float:
    """Returns the seconds of summing the gradients of `devices` devices."""
    if devices == 1:
        return 0.0
    rate = costs.within if devices <= costs.per_machine else costs.between
    sent = 2 * (devices - 1) / devices * costs.gradient_bytes * costs.parameters
    return sent / rate + 2 * costs.latency_secs * math.log2(devices)


def young_secs(pause: float, failure_secs: float) -> float:
    """Returns the best time between checkpoints, in seconds."""
    return math.sqrt(2 * pause * failure_secs)


def shares(costs: Costs, devices: int) -> dict[str, float]:
    """Returns what part of the time each thing takes, and the times behind it in seconds."""
    compute = compute_secs(costs)
    waiting = max(0.0, all_reduce_secs(costs, devices) - costs.hidden * compute)
    step = compute + waiting + costs.loop_secs
    state = costs.parameters * costs.state_bytes
    pause, write = state / costs.copy_rate, state / costs.write_rate
    failure = 3600 * costs.device_failure_hours / devices
    every = max(young_secs(pause, failure), write)  # a save ends before the next one begins
    lost = (every / 2 + costs.start_secs) / failure
    return {
        "step": step,
        "compute": compute / step,
        "communication": waiting / step,
        "loop": costs.loop_secs / step,
        "checkpoint every": every,
        "checkpoint pause": pause / every,
        "lost to failures": lost,
    }


def bottleneck(found: dict[str, float]) -> str:
    """Returns what loses most."""
    losses = ("communication", "loop", "checkpoint pause", "lost to failures")
    return max(losses, key=lambda name: found[name])


def main(costs: Costs, devices: list[int]) -> None:
    print(f"{costs.parameters:,.0f} parameters, {costs.tokens:,.0f} tokens a device and step\n")
    print(
        "| devices | step | compute | communication | loop | checkpoint every | its pause "
        "| lost to failures | bottleneck |\n|---:|---:|---:|---:|---:|---:|---:|---:|---|"
    )
    for count in devices:
        found = shares(costs, count)
        print(
            f"| {count:,} | {1e3 * found['step']:,.1f} ms | {found['compute']:.1%} "
            f"| {found['communication']:.1%} | {found['loop']:.1%} "
            f"| {found['checkpoint every'] / 60:,.0f} min | {found['checkpoint pause']:.2%} "
            f"| {found['lost to failures']:.2%} | {bottleneck(found)} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 1024])
    for each in fields(Costs):
        flag = "--" + each.name.replace("_", "-")
        parser.add_argument(flag, type=type(each.default), default=each.default)
    given = vars(parser.parse_args())
    counts = given.pop("devices")
    main(Costs(**given), counts)
