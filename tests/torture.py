"""Kill, stop, starve and damage small runs, and compare each with an undisturbed one.

    bash runs/torture.sh [PART ...]    # all parts take about 10 minutes; the end is a table

Each part is a function that returns what it counted, and asserts that nothing was lost.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from helpers_training import metrics, random_examples, sft_folder, text_folder, weights_of

from nanosft.weights import checkpoints

ROOT = Path(__file__).parents[1]
STEPS = 600
FLAGS = {"max_steps": STEPS, "save_every": 50, "eval_every": 0, "batch_size": 1}
COMMAND_LINE = ["--device", "cpu", "--init", "scratch", "--n_layer", 1, "--n_head", 2, "--n_embd",
                16, "--block_size", 16, "--rows_per_step", 4, "--warmup_steps", 2,
                "--learning_rate", 1e-2, "--eval_tokens", 64]  # helpers_training.TINY


class Yard:
    """A temporary folder with data, and whole runs to compare with."""

    def __init__(self, folder: Path):
        self.folder = folder
        ids = np.random.default_rng(0).integers(0, 257, 16 * 400 + 3).tolist()
        self.text = text_folder(folder / "text", train=ids, val=ids[:50])
        self.sft = sft_folder(folder / "sft", train=random_examples(40), val=random_examples(5))

    def whole(self, ranks: int) -> Path:
        """An undisturbed run on 1 or 2 ranks."""
        out = self.folder / f"whole_{ranks}"
        if not out.exists():
            check(self.start(out, ranks).wait() == 0, f"the undisturbed run on {ranks} rank(s)")
        return out

    def start(self, out: Path, ranks: int = 1, *more, **flags) -> subprocess.Popen:
        """Train with --resume; on 2 ranks, under torchrun. The output goes to OUT.log."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        call = [sys.executable, *(launcher if ranks > 1 else []), *more, "train_gpt2.py",
                *COMMAND_LINE, "--data", self.text, "--out", out, "--resume"]
        for key, value in (FLAGS | flags).items():
            call += [f"--{key}", value]
        # without this variable, torchrun's own restart fails often
        env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(f"{out}.log", "a") as log:
            return subprocess.Popen(list(map(str, call)), cwd=ROOT, env=env, stdout=log, stderr=log)


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def check_equal(a: Path, b: Path) -> None:
    check(metrics(a) == metrics(b), f"metrics of {a.name} differ from those of {b.name}")
    same = all(torch.equal(x, y) for x, y in zip(weights_of(a), weights_of(b), strict=True))
    check(same, f"weights of {a.name} differ from those of {b.name}")


def rows(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def starts(out: Path) -> int:
    path = out / "run.json"
    return len(json.loads(path.read_text())["starts"]) if path.exists() else 0


def wait_for(process: subprocess.Popen, found, seconds: int = 120) -> None:
    """Wait until found(), or the end of the process."""
    end = time.monotonic() + seconds
    while process.poll() is None and not found():
        check(time.monotonic() < end, "nothing happened for two minutes")
        time.sleep(0.02)


def children_of(parent: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


# ----- the parts ---------------------------------------------------------------------------------


def kills(yard: Yard) -> str:
    """SIGKILL a run on one rank at random moments, also while it saves, until it is done."""
    out, n, now = yard.folder / "kills", 0, random.Random(0)
    while True:
        process = yard.start(out, save_every=20)
        start = checkpoints(out)[-1:]
        wait_for(process, lambda: checkpoints(out)[-1:] != start)  # noqa: B023
        time.sleep(now.random() * 0.3)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        n += 1
    check(process.returncode == 0, "the last start failed")
    check_equal(out, yard.whole(1))
    return f"{n} kills, equal bit for bit"


def restarts(yard: Yard) -> str:
    """torchrun --max-restarts=2 starts the ranks again when one is killed, twice."""
    out = yard.folder / "restarts"
    process = yard.start(out, 2, "--max-restarts=2")
    for n, (rank, step) in enumerate(((1, 130), (0, 330)), start=1):
        wait_for(process, lambda: rows(out) > step and starts(out) == n)  # noqa: B023
        os.kill(sorted(children_of(process.pid))[rank], signal.SIGKILL)
        wait_for(process, lambda: starts(out) == n + 1)  # noqa: B023
    check(process.wait(timeout=300) == 0, "torchrun did not recover")
    check_equal(out, yard.whole(2))
    return f"{starts(out) - 1} restarts, equal bit for bit"


def stops(yard: Yard) -> str:
    """SIGTERM to torchrun: the ranks save, and the run goes on; then only torchrun is killed."""
    out = yard.folder / "stops"
    process = yard.start(out, 2, save_every=0)
    wait_for(process, lambda: rows(out) > 100)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    saved = [path.name for path in checkpoints(out)]
    check(saved == [f"step_{rows(out):06d}"], f"{rows(out)} rows, but {saved}")
    process = yard.start(out, 2, save_every=0)
    wait_for(process, lambda: rows(out) > 300)
    ranks = children_of(process.pid)
    process.kill()
    process.wait()
    end = time.monotonic() + 40
    while children_alive(ranks):
        check(time.monotonic() < end, "ranks live on without torchrun")
        time.sleep(0.1)
    check(yard.start(out, 2, save_every=0).wait() == 0, "the last start failed")
    check_equal(out, yard.whole(2))
    return "SIGTERM and a lost launcher, equal bit for bit"


def children_alive(pids: list[int]) -> bool:
    """A zombie (its parent has not read its exit code) is not alive."""
    def state(pid):
        path = Path(f"/proc/{pid}/stat")
        return path.read_text().rpartition(")")[2].split()[0] if path.exists() else "Z"

    return any(state(pid) != "Z" for pid in pids)


def full_disk(yard: Yard) -> str:
    """A disk of 1 MB (tmpfs) gets full while saving, again and again; old checkpoints make room."""
    disk, n = yard.folder / "disk", 0
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return "skipped: needs the right to mount a tmpfs"
    try:
        out, log = disk / "out", yard.folder / "disk.log"
        while True:
            process = yard.start(out)
            code = process.wait()
            shutil.move(f"{out}.log", log)
            if code == 0:
                break
            n += 1
            lines = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
            check(code == 2 and len(lines) == 1, log.read_text())
            check(str(out) in lines[0] and "Traceback" not in log.read_text(), log.read_text())
            check(not list(out.glob("tmp_*")), "a half-written checkpoint")
            for old in checkpoints(out)[:-1]:
                shutil.rmtree(old)
        check(n > 0, "the disk never got full")
        check_equal(out, yard.whole(1))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return f"{n} full disks, equal bit for bit"


def damage(yard: Yard) -> str:
    """2,000 damaged files; see tests/torture_damage.py."""
    done = subprocess.run([sys.executable, "-m", "tests.torture_damage"], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE)
    check(done.returncode == 0, done.stdout)
    return done.stdout.strip().splitlines()[-1]


def hosts(yard: Yard) -> str:
    """Two network namespaces, and a 2-rank run continued on 4 ranks."""
    call = [sys.executable, "-m", "pytest", "-q", "-rs", "tests/test_two_hosts.py",
            "tests/test_faults.py::test_run_of_two_ranks_continues_on_one_or_four"]
    done = subprocess.run(call, cwd=ROOT, env=os.environ | {"TORTURE": "1"}, text=True,
                          stdout=subprocess.PIPE)
    check(done.returncode == 0, done.stdout)
    return ", ".join(line.strip("= ") for line in done.stdout.splitlines()
                     if line.startswith("SKIPPED") or " passed" in line or line.endswith("[100%]"))


def steps(yard: Yard) -> str:
    """20,000 steps: memory and open files after 1,000 steps and at the end."""
    out, found, n = yard.folder / "steps", {}, 20_000
    process = yard.start(out, max_steps=n, save_every=1000, keep=2, log_every=1000, rows_per_step=1)
    for at in (1010, n - 100):  # between two checkpoints
        wait_for(process, lambda: rows(out) >= at, 1200)  # noqa: B023
        check(process.poll() is None, "the run ended early")
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        found[at] = (pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files)
    check(process.wait() == 0, "the run failed")
    (before, files), (after, files_after) = found.values()
    check(files == files_after, f"{files} open files, later {files_after}")
    check(after < before + 20, f"{before:.0f} MB, later {after:.0f} MB")
    return (f"{before:.1f} MB and {files} open files at step 1,000, {after:.1f} MB and "
            f"{files_after} at the end")


PARTS = {part.__name__: part for part in (kills, restarts, stops, full_disk, damage, hosts, steps)}


def main(names: list[str]) -> int:
    table, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="nanosft_torture_") as folder:
        yard = Yard(Path(folder))
        for name in names or PARTS:
            start = time.monotonic()
            try:
                result = PARTS[name](yard)
            except AssertionError as error:
                failed, result = failed + 1, f"FAILED: {error}"
            table.append(f"| {name:9} | {time.monotonic() - start:4.0f} s | {result} |")
            print(table[-1], flush=True)
    print("\n| part      | time   | result |\n|---|---|---|", *table, sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
