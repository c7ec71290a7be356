"""Past this machine: the arithmetic of the cost model, and files that launch a program."""

import importlib.util
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "examples" / "launch"

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_communication_is_that_of_a_ring(scale):
    costs = scale.Costs(parameters=1e9, between=4.5e10, latency_secs=0.0)
    # 2 x 63 / 64 x 2 bytes x 1e9 = 3.9375 GB, at 45 GB/s
    assert scale.all_reduce_secs(costs, 64) == pytest.approx(3.9375 / 45)
    assert scale.all_reduce_secs(costs, 1) == 0.0
    assert scale.all_reduce_secs(costs, 8) == pytest.approx(3.5 / 300)  # within a machine


def test_checkpoints_are_as_often_as_young_computes(scale):
    assert scale.young_secs(2.2, 3600 * 50_000 / 1024) == pytest.approx(879.5, abs=0.5)

    # No other interval costs less: pause / every + every / 2 / failures.
    def cost(every):
        return 5 / every + every / 2 / 1e5

    best = scale.young_secs(5, 1e5)
    assert cost(best) < min(cost(best * 0.9), cost(best * 1.1))


def test_an_overlapped_all_reduce_costs_only_what_outlasts_the_backward_pass(scale):
    flat = scale.shares(scale.Costs(hidden=0.0), 1024)
    overlapped = scale.shares(scale.Costs(), 1024)
    assert flat["communication"] > 0.3 > 0.1 > overlapped["communication"]
    parts = [flat[name] for name in ("compute", "communication", "loop")]
    assert math.fsum(parts) == pytest.approx(1.0)
    assert scale.bottleneck(flat) == "communication"


@pytest.mark.parametrize("name", ["one_machine.sh", "machines.sh", "slurm.sbatch"])
def test_shell_scripts_parse(name):
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("name", ["jobset.yaml", "skypilot.yaml"])
def test_yaml_files_parse(name):
    yaml = pytest.importorskip("yaml")
    loaded = yaml.safe_load((LAUNCH / name).read_text())
    assert loaded.get("kind", "JobSet") == "JobSet"
    assert "torchrun" in str(loaded)


def test_torchrun_has_the_options_of_the_files():
    run = pytest.importorskip("torch.distributed.run")
    known = {flag for action in run.get_args_parser()._actions for flag in action.option_strings}
    for path in sorted(LAUNCH.iterdir()):
        text = path.read_text()
        if "torchrun" not in text:
            continue
        command = text[text.index("torchrun") :].split("several_devices.py")[0]
        flags = re.findall(r"(?<![\w-])--[a-z-]+", command)
        assert flags, path.name
        assert set(flags) <= known, path.name


def test_the_ray_example_compiles():
    path = LAUNCH / "ray_train.py"
    compile(path.read_text(), path, "exec")
