"""Kill, stop, starve and damage small runs, and compare each with an undisturbed one.

    bash runs/torture.sh [PART ...]    # all parts take about 12 minutes; the end is a table

Each part is a function that returns what it counted, and asserts that nothing was lost. A part that
fails does not stop the others.
"""

import concurrent.futures
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run bash runs/torture.sh", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
from helpers_processes import children_of, is_alive
from helpers_training import metrics, random_examples, sft_folder, text_folder, weights_of

from nanosft.weights import checkpoints
from sft_data import SFTDataset

ROOT = Path(__file__).parents[1]
STEPS = 600
KILLS = 50  # of each of two runs
FLAGS = {"max_steps": STEPS, "save_every": 50, "eval_every": 0, "batch_size": 1}
COMMAND_LINE = ["--device", "cpu", "--init", "scratch", "--n_layer", 1, "--n_head", 2, "--n_embd",
                16, "--block_size", 16, "--rows_per_step", 4, "--warmup_steps", 2,
                "--learning_rate", 1e-2, "--eval_tokens", 64]  # helpers_training.TINY


class Yard:
    """A temporary folder with data, whole runs to compare with, and the processes of a part."""

    def __init__(self, folder: Path):
        self.folder, self.processes = folder, []
        ids = np.random.default_rng(0).integers(0, 257, 16 * 400 + 3).tolist()
        self.data = {
            "train_gpt2": text_folder(folder / "text", train=ids, val=ids[:50]),
            "train_sft": sft_folder(folder / "sft", train=random_examples(40),
                                    val=random_examples(5)),
        }

    def whole(self, ranks: int = 1, trainer: str = "train_gpt2") -> Path:
        """An undisturbed run on 1 or 2 ranks."""
        out = self.folder / f"whole_{trainer}_{ranks}"
        if not out.exists():
            self.finish(out, ranks, trainer=trainer)
        return out

    def start(self, out: Path, ranks: int = 1, *more, trainer: str = "train_gpt2", **flags,
              ) -> subprocess.Popen:
        """Train with --resume; on 2 ranks, under torchrun."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        call = [sys.executable, *(launcher if ranks > 1 else []), *more, f"{trainer}.py",
                *COMMAND_LINE, "--data", self.data[trainer], "--out", out, "--resume"]
        for key, value in (FLAGS | flags).items():
            call += [f"--{key}", value]
        # without this variable, torchrun's own restart fails often
        env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with self.log(out).open("w") as log:
            process = subprocess.Popen(list(map(str, call)), cwd=ROOT, env=env, stdout=log,
                                       stderr=log)
        self.processes.append(process)
        return process

    def log(self, out: Path) -> Path:
        """What the latest process with this --out has printed."""
        return self.folder / f"{out.name}.log"

    def finish(self, out: Path, *args, **flags) -> None:
        """Start it, and it must end well."""
        code = self.start(out, *args, **flags).wait(timeout=600)
        check(code == 0, f"exit code {code}: {self.log(out).read_text()[-300:]}")

    def clean_up(self) -> None:
        """Kill what a part that failed has left running."""
        for process in self.processes:
            if process.poll() is None:
                for pid in (*children_of(process.pid), process.pid):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
        self.processes.clear()


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


def wait_for(found: Callable[[], bool], process: subprocess.Popen | None = None,
             seconds: int = 120, pause: float = 0.02) -> None:
    """Wait until found(), or the end of the process."""
    end = time.monotonic() + seconds
    while not found() and (process is None or process.poll() is None):
        check(time.monotonic() < end, f"nothing happened for {seconds} s")
        time.sleep(pause)


# ----- the parts ---------------------------------------------------------------------------------


def kills(yard: Yard) -> str:
    """SIGKILL a run of each trainer at random moments, many of them while it saves."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda trainer: kill_often(yard, trainer), yard.data))
    return f"{' + '.join(map(str, found))} kills, equal bit for bit"


def kill_often(yard: Yard, trainer: str) -> int:
    out, now, n = yard.folder / f"kills_{trainer}", random.Random(trainer), 0
    while n < KILLS:
        process = yard.start(out, trainer=trainer, save_every=4)
        last = checkpoints(out)[-1:]
        if now.random() < 0.1:
            time.sleep(now.uniform(0, 4))  # while it starts
        else:
            wait_for(lambda: checkpoints(out)[-1:] != last, process)  # noqa: B023
            time.sleep(now.uniform(0, 0.05))
        if process.poll() is not None:  # it is done, or it failed
            break
        process.kill()
        process.wait()
        n += 1
    yard.finish(out, trainer=trainer)
    check_equal(out, yard.whole(trainer=trainer))
    return n


def restarts(yard: Yard) -> str:
    """torchrun --max-restarts=2 starts the ranks again when one is killed, twice."""
    out = yard.folder / "restarts"
    process = yard.start(out, 2, "--max-restarts=2")
    for n, (rank, step) in enumerate(((1, 130), (0, 330)), start=1):
        wait_for(lambda: rows(out) > step and starts(out) == n, process)  # noqa: B023
        check(process.poll() is None, "torchrun ended early")
        os.kill(children_of(process.pid)[rank], signal.SIGKILL)
        wait_for(lambda: starts(out) == n + 1, process)  # noqa: B023
    check(process.wait(timeout=300) == 0, "torchrun did not recover")
    check_equal(out, yard.whole(2))
    return f"{starts(out) - 1} restarts, equal bit for bit"


def stops(yard: Yard) -> str:
    """SIGTERM to torchrun: the ranks save, and the run goes on; then only torchrun is killed."""
    out = yard.folder / "stops"
    process = yard.start(out, 2, save_every=0)
    wait_for(lambda: rows(out) > 100, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    saved = [path.name for path in checkpoints(out)]
    check(saved == [f"step_{rows(out):06d}"], f"{rows(out)} rows, but {saved}")
    process = yard.start(out, 2, save_every=0)
    wait_for(lambda: rows(out) > 300, process)
    ranks = children_of(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(is_alive, ranks)), seconds=40)
    yard.finish(out, 2, save_every=0)
    check_equal(out, yard.whole(2))
    return "SIGTERM and a lost launcher, equal bit for bit"


def full_disk(yard: Yard) -> str:
    """A disk of 1 MB (tmpfs) gets full while saving, again and again; old checkpoints make room."""
    disk, n = yard.folder / "disk", 0
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return "skipped: needs the right to mount a tmpfs"
    try:
        out = disk / "full"
        while yard.start(out).wait(timeout=300) != 0:
            n += 1
            log = yard.log(out).read_text()
            lines = [line for line in log.splitlines() if line.startswith("error: ")]
            check(len(lines) == 1 and str(out) in lines[0] and "Traceback" not in log, log[-300:])
            check(not list(out.glob("*.tmp")), "a half-written checkpoint")
            for old in checkpoints(out)[:-1]:
                shutil.rmtree(old)
            check(n < STEPS, "the run does not go on")
        check(n > 0, "the disk never got full")
        check_equal(out, yard.whole())
    finally:
        yard.clean_up()
        subprocess.run(["umount", str(disk)], check=True)
    return f"{n} full disks, equal bit for bit"


def damage(yard: Yard) -> str:
    """2,000 damaged files; see tests/torture_damage.py."""
    done = subprocess.run([sys.executable, "-m", "tests.torture_damage"], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE)
    check(done.returncode == 0, done.stdout)
    return done.stdout.strip().splitlines()[-1].strip("| ").replace(" | ", ": ")


def hosts(yard: Yard) -> str:
    """Two network namespaces, and a 2-rank run continued on 4 ranks."""
    call = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "--durations=0",
            "tests/test_two_hosts.py",
            "tests/test_faults.py::test_run_of_two_ranks_continues_on_one_or_four"]
    done = subprocess.run(call, cwd=ROOT, env=os.environ | {"TORTURE": "1"}, text=True,
                          stdout=subprocess.PIPE)
    check(done.returncode == 0, done.stdout[-600:])
    return ", ".join(line.strip("= ") for line in done.stdout.splitlines()
                     if line.startswith("SKIPPED") or " passed" in line or " skipped" in line)


def real_chats(yard: Yard) -> tuple[str, str]:
    """Shards of 300 rows of GSM8K, or generated ones where it is not at hand; and which of them."""
    folder, source = yard.folder / "chats", ROOT.parent / "shared/data/gsm8k_train.jsonl"
    lines, now = [], random.Random(0)
    if source.exists():
        lines = source.read_text("utf-8").splitlines()[:300]
    for _ in range(300 - len(lines)):
        words = now.choices(["red", "blue", "seven", "eight"], k=now.randint(2, 60))
        lines.append(json.dumps({"prompt": f"Repeat {len(words)}:", "response": " ".join(words)}))
    (yard.folder / "chats.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    subprocess.run([sys.executable, "sft_data.py", "--source", yard.folder / "chats.jsonl", "--out",
                    folder, "--encoding", "bytes", "--val_fraction", "0.05", "--workers", "1"],
                   cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return str(folder), "GSM8K" if source.exists() else "generated rows"


def eight(yard: Yard) -> str:
    """8 ranks on real rows, shares of validation that differ; one is killed; resumed on 4 and 1."""
    data, name = real_chats(yard)
    n_val = len(SFTDataset(data, "val", 512))
    check(n_val % 8 and n_val % 4, f"{n_val} rows of validation are the same for each rank")
    flags = {"data": data, "trainer": "train_sft", "block_size": 512, "n_embd": 64, "max_steps": 24,
             "rows_per_step": 8, "save_every": 4, "eval_every": 8, "eval_tokens": 10**6,
             "eval_prompts": 3}
    whole, killed = yard.folder / "eight", yard.folder / "eight_killed"
    yard.finish(whole, 8, **flags)
    process = yard.start(killed, 8, **flags)
    wait_for(lambda: rows(killed) > 10, process)
    os.kill(children_of(process.pid)[5], signal.SIGKILL)
    check(process.wait(timeout=120) != 0, "torchrun did not notice that rank 5 was killed")
    check(0 < 4 * len(checkpoints(killed)) <= rows(killed) < 24, "it did not end in the middle")
    furthest = 0.0
    for ranks in (4, 1):
        out = shutil.copytree(killed, yard.folder / f"eight_on_{ranks}")
        yard.finish(out, ranks, **flags)
        for ours, theirs in zip(metrics(out), metrics(whole), strict=True):
            same = all(ours[key] == theirs[key] for key in ("step", "lr", "tokens"))
            check(same and ours.keys() == theirs.keys(), f"step {ours['step']} has other rows")
            furthest = max(furthest, *(abs(ours[key] / theirs[key] - 1) for key in
                                       ("loss", "val_loss") if key in ours))
    check(furthest < 1e-5, f"losses differ by {furthest:.1e}")
    losses = [f"{row['val_loss']:.4f}" for row in metrics(whole) if "val_loss" in row]
    return (f"{name}, rank 5 of 8 killed after step {rows(killed)}, resumed on 4 and on 1: losses "
            f"differ by at most {furthest:.1e}; val_loss {' '.join(losses)} ({n_val} rows)")


def steps(yard: Yard) -> str:
    """20,000 steps: memory and open files after 1,000 steps and at the end."""
    out, found, n = yard.folder / "steps", {}, 20_000
    process = yard.start(out, max_steps=n, save_every=1000, keep=2, log_every=1000, rows_per_step=1)
    for at in (1010, n - 500):  # between two checkpoints
        wait_for(lambda: rows(out) >= at, process, seconds=1200, pause=0.2)  # noqa: B023
        check(process.poll() is None, "the run ended early")
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        found[at] = (pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files)
    check(process.wait(timeout=300) == 0, "the run failed")
    (before, files), (after, files_after) = found.values()
    check(files == files_after, f"{files} open files, later {files_after}")
    check(after < before + 20, f"{before:.0f} MB, later {after:.0f} MB")
    return (f"{before:.1f} MB and {files} open files at step 1,000, {after:.1f} MB and "
            f"{files_after} at the end")


PARTS = {part.__name__: part
         for part in (kills, restarts, stops, full_disk, damage, hosts, eight, steps)}


def main(names: list[str]) -> int:
    """The number of parts that failed."""
    table, failed = [], 0
    if unknown := set(names) - set(PARTS):
        sys.exit(f"error: no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory("", "nanosft_torture_", ignore_cleanup_errors=True) as folder:
        yard = Yard(Path(folder))
        for name in names or PARTS:
            start = time.monotonic()
            try:
                result = PARTS[name](yard)
            except Exception as error:
                failed, result = failed + 1, f"FAILED: {type(error).__name__}: {error}"
            finally:
                yard.clean_up()
            result = " ".join(result.replace("|", "/").split())
            table.append(f"| {name:9} | {time.monotonic() - start:4.0f} s | {result} |")
            print(table[-1], flush=True)
    print("\n| part      | time   | result |\n|---|---|---|", *table, sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
