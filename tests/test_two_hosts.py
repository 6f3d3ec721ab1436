"""Two machines, played by two network namespaces that a virtual cable joins.

A run on both has the losses of one machine. When the cable is cut in the middle, both ends say so
in one line, and started again they go on. Needs root, `ip` (iproute2) and `unshare`; takes two
minutes, so only runs/torture.sh runs it.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from helpers_training import TINY, fine_tune, metrics, random_examples, sft_folder

ROOT = Path(__file__).parents[1]
STEPS, TIMEOUT = 300, 10  # seconds
FLAGS = {"max_steps": STEPS, "save_every": 20, "eval_every": 0, "eval_prompts": 0, "batch_size": 1}
pytestmark = pytest.mark.skipif("TORTURE" not in os.environ, reason="long; see runs/torture.sh")


def sh(command: str, check: bool = True) -> None:
    subprocess.run(command, shell=True, check=check, capture_output=True)


def remove_hosts(a: str, b: str) -> None:
    for name in (a, b):
        sh(f"ip netns del {name}", check=False)


@pytest.fixture
def hosts():
    """The names of two namespaces with the addresses 10.77.0.1 and 10.77.0.2."""
    a, b = (f"nanosft{os.getpid()}{letter}" for letter in "ab")
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs `ip` (iproute2) and `unshare`")
    try:
        for name in (a, b):
            sh(f"ip netns add {name} && ip -n {name} link set lo up")
        sh(f"ip -n {a} link add cable type veth peer name cable netns {b}")
        for number, name in enumerate((a, b), start=1):
            sh(f"ip -n {name} addr add 10.77.0.{number}/24 dev cable")
            sh(f"ip -n {name} link set cable up")
    except subprocess.CalledProcessError as error:
        remove_hosts(a, b)
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    yield a, b
    remove_hosts(a, b)


def start(hosts, number: int, data: str, out: Path, *more) -> subprocess.Popen:
    """runs/multinode.sh on host 0 or 1, with one rank."""
    flags = [*more, "--data", data, "--out", out, "--resume", "--dist_timeout", TIMEOUT / 60]
    for key, value in (TINY | FLAGS).items():
        flags += [f"--{key}", value]
    settings = {"MACHINES": 2, "RANK_OF_MACHINE": number, "HEAD": "10.77.0.1", "N": 1,
                "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": 1}
    script = f'hostname host{number}; exec bash runs/multinode.sh "$@"'
    call = ["ip", "netns", "exec", hosts[number], "unshare", "--uts", "bash", "-c", script, "bash"]
    return subprocess.Popen(
        [*call, *map(str, flags)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {k: str(v) for k, v in settings.items()})


def wait_for(found, seconds: int = 120) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


def errors_in(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def test_run_on_two_hosts_survives_a_cut_cable_and_has_the_losses_of_one_host(hosts, tmp_path):
    data = sft_folder(tmp_path / "data", train=random_examples(23), val=random_examples(5, seed=1))
    out = tmp_path / "out"
    running = [start(hosts, number, data, out) for number in (0, 1)]
    wait_for(lambda: (out / "step_000040").exists() or running[0].poll() is not None)
    sh(f"ip -n {hosts[1]} link set cable down")
    cut = time.monotonic()
    for number, process in enumerate(running):
        output, _ = process.communicate(timeout=120)
        (line,) = errors_in(output)
        assert "lost the connection to another rank" in line, output
        assert f"(rank {number} on host{number})" in line
        assert process.returncode != 0
        assert "Traceback (most recent call last):\n  File \"train_sft" not in output
    assert time.monotonic() - cut < TIMEOUT + 30
    assert 40 <= len(metrics(out)) < STEPS

    sh(f"ip -n {hosts[1]} link set cable up")
    for process in [start(hosts, number, data, out) for number in (0, 1)]:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    fine_tune(data, tmp_path / "alone", **FLAGS)
    for ours, alone in zip(metrics(out), metrics(tmp_path / "alone"), strict=True):
        assert ours["step"] == alone["step"]
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-3)


def test_host_with_other_flags_is_named_before_the_first_step(hosts, tmp_path):
    data = sft_folder(tmp_path / "data", train=random_examples(23))
    running = [start(hosts, number, data, tmp_path / "out", "--seed", number)
               for number in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    (line,) = errors_in("".join(outputs))
    assert line.startswith("error: rank 1 on host1 has seed 1, but rank 0 on host0 has 0; use the "
                           "same flags, data, and packages everywhere"), outputs
    assert not (tmp_path / "out").exists()
