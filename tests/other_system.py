"""Imitate what Windows lacks, then run every command: python -m tests.other_system FOLDER

The commands run as a user would call them, with two workers, which import this file, too.
"""

import importlib
import os
import shutil
import signal
import sys
from pathlib import Path

MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
FUNCTIONS = ("fork", "sysconf", "getuid", "geteuid", "getpgid", "killpg", "setsid", "O_DIRECTORY")
SIGNALS = ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD")


def take_away() -> None:
    """From now on, this process lacks and refuses what Windows does."""
    importlib.import_module("asyncio")  # on Linux, it asks for sysconf
    sys.modules |= dict.fromkeys(MODULES)  # `import` finds None and raises
    for module, names in ((os, FUNCTIONS), (signal, SIGNALS)):
        for name in names:
            delattr(module, name)
    os.open, os.fsync = refusing(os.open, open_folder), refusing(os.fsync, only_read)
    for name in ("rename", "replace"):
        setattr(os, name, refusing(refusing(getattr(os, name), onto_a_folder), in_use))
    os.unlink = os.remove = refusing(os.unlink, in_use)
    os.kill = refusing(os.kill, another_process)
    shutil._use_fd_functions = False  # rmtree would open folders


def refusing(function, is_refused):
    def call(*args, **kwargs):
        if is_refused(*args):
            raise PermissionError(13, f"{is_refused.__name__}, on Windows", str(args[0]))
        return function(*args, **kwargs)
    return call


def open_folder(path, *_) -> bool:
    return os.path.isdir(path)


def only_read(descriptor) -> bool:
    flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text("utf-8").split()[3]
    return int(flags, 8) & os.O_ACCMODE == os.O_RDONLY


def onto_a_folder(_, target) -> bool:
    return os.path.isdir(target)


def in_use(path, *_) -> bool:
    """Is this file, or one in this folder, open or mapped?"""
    maps = Path("/proc/self/maps").read_text("utf-8").splitlines()
    places = {line.split(maxsplit=5)[-1] for line in maps}
    places |= {os.path.realpath(place) for place in Path("/proc/self/fd").iterdir()}
    path = os.path.realpath(path)
    return any(place == path or place.startswith(f"{path}/") for place in places)


def another_process(pid, number) -> bool:
    return pid != os.getpid() or number != signal.SIGTERM  # 0 would be Ctrl-C


def run(command: str, *flags) -> None:
    """One command as its script would run it."""
    from nanosft.cli import run_cli

    module = importlib.import_module(command)
    sys.argv = [command, *map(str, flags)]
    run_cli(module.main, module.Config)


def main(folder: Path) -> None:
    """A text and two chats to a model that answers them."""
    size = ("--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--block_size", 64, "--device", "cpu")
    steps = ("--batch_size", 1, "--rows_per_step", 2, "--save_every", 1, "--keep", 1, *size)
    chats, bytes_ = folder / "chats.jsonl", ("--encoding", "bytes", "--workers", 2)
    (folder / "sft").mkdir()  # an empty folder may be there already
    run("fineweb", "--source", folder / "text.txt", "--out", folder / "text", *bytes_)
    run("sft_data", "--source", f"{chats}*150", "--out", folder / "sft", *bytes_)
    run("sft_data", "--show", 1, "--data", folder / "sft", "--html", folder / "mask.html")
    run("train_gpt2", "--data", folder / "text", "--out", folder / "base", "--max_steps", 2, *steps)
    for minutes in (0.0001, 100):  # stopped, then resumed
        try:
            run("train_sft", "--data", folder / "sft", "--out", folder / "run", "--max_steps", 3,
                "--init", "scratch", "--resume", "--max_minutes", minutes, *steps)
        except SystemExit as stopped:
            assert stopped.code == 0
    run("evaluate", "--model", folder / "run", "--data", chats, "--save", folder / "answers.jsonl",
        "--max_new_tokens", 8, "--device", "cpu")
    run("tools.export", "--model", folder / "run", "--out", folder / "export")
    run("chat", "--model", folder / "export", "--prompt", "hi 東京", "--max_new_tokens", 8)
    print("all commands: 東京")


if __name__ in ("__main__", "__mp_main__"):  # this process, and a spawned worker
    take_away()
if __name__ == "__main__":
    main(Path(sys.argv[1]))
