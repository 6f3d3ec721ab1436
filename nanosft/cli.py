"""The command line of every script: flags from a dataclass, their bounds, one-line user errors."""

import inspect
import io
import operator
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from nanosft.errors import NO_SPACE, UserError, one_line
from nanosft.machine import open_store

BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
NO_PATHS = {"prompt", "system", "columns", "ignore", "where"}  # flags of text, where ~ is only ~
LARGEST = 2**62  # of a flag without an upper bound: beyond it, int64 could overflow


def run_cli(main: Callable, config_class: type) -> None:
    """Parse the flags into `config_class` and call main(config).

    A UserError, an OSError on a file, or a lost rank prints one line and exits with code 2.
    Anything else is our bug and keeps its traceback.
    """
    import tyro

    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape what is not in a terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this process
        end_with(os.getppid())
    try:
        try:
            config = tyro.cli(config_class, prog=program(), use_underscores=True, config=(
                tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff))
            check_bounds(config)
            main(expand_home(config))
        finally:
            sys.stdout.flush()  # here, where a closed pipe is caught
    except UserError as error:
        exit_with(str(error))
    except BrokenPipeError:  # the reader, for example `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
    except OSError as error:
        if error.filename is None and error.errno not in NO_SPACE:
            raise
        exit_with(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    except KeyboardInterrupt:
        exit_with("interrupted", 130)
    except RuntimeError as error:
        import torch.distributed as dist

        gloo = re.search("gloo|Connection closed by peer", str(error), re.IGNORECASE)
        if not gloo and not isinstance(error, dist.DistError):  # NCCL's
            raise
        exit_with("lost the connection to another rank, which failed or is down; see its output")


def program() -> str:
    """How the user called this command, for its help text."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {shlex.quote(sys.argv[0])}"


def to_paste(script: str, *flags: str) -> str:
    """A command of this project, quoted for a shell, that works in the current folder."""
    path = Path(__file__).parents[1] / script
    is_here = Path(script).resolve() == path.resolve()
    words = shlex.join([script if is_here else str(path), *flags])
    is_trainer = script.startswith("train_")
    return f"{'torchrun --standalone --nproc_per_node=1' if is_trainer else 'python'} {words}"


def expand_home(config):
    """The config with ~ as the home folder in every path: the shell leaves one in quotes alone."""
    def expand(value):
        if isinstance(value, tuple):
            return tuple(map(expand, value))
        return os.path.expanduser(value) if isinstance(value, str) else value

    for name in vars(config).keys() - NO_PATHS:
        setattr(config, name, expand(getattr(config, name)))
    return config


def check_bounds(config) -> None:
    """UserError if a number is set but outside the bounds of its flag; NaN always is."""
    bounds_by_flag = bounds_of(type(config))
    for name, values in vars(config).items():
        for value in values if isinstance(values, tuple) else (values,):
            if not isinstance(value, int | float):
                continue
            bounds = bounds_by_flag.get(name, {})
            if not value <= LARGEST and not {"le", "lt"} & bounds.keys():
                bounds = bounds | {"le": LARGEST}
            if not all(getattr(operator, key)(value, limit) for key, limit in bounds.items()):
                words = [f"{BOUNDS[key]} {limit:,}" for key, limit in bounds.items()]
                raise UserError(f"--{name} {value} must be {' and '.join(words)}")


def bounds_of(config_class: type) -> dict[str, dict[str, float]]:
    """{flag: {"ge": 1, …}} of the flags with bounds, from annotations as Annotated[int, Ge(1)].

    A flag that a subclass overrides without bounds keeps those of its parent.
    """
    found = {}
    for cls in reversed(config_class.__mro__):
        for name, hint in inspect.get_annotations(cls, eval_str=True).items():
            bounds = {key: getattr(bound, key) for bound in getattr(hint, "__metadata__", ())
                      for key in BOUNDS if hasattr(bound, key)}  # Ge(1).ge == 1
            found[name] = bounds or found.get(name, {})
    return found


def exit_with(message: str, code: int = 2) -> NoReturn:
    """Print `error: message`, once for all ranks with the same message, and exit."""
    message = one_line(message)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1 or is_first_to_report(message):
        where = f" (rank {rank} on {socket.gethostname()})" if world_size > 1 else ""
        print(f"error: {message}{where}", file=sys.stderr, flush=True)
    sys.exit(code)


def is_first_to_report(message: str) -> bool:
    """True on exactly one of the ranks that hit the same error: they count in torchrun's store.

    If the store cannot be reached, every rank reports: repeated lines are better than none.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)  # of --max-restarts: the same store
    store = open_store(5)
    try:
        return not store or store.add(f"nanosft error, attempt {attempt}: {message}", 1) == 1
    except RuntimeError:  # torch.distributed.DistError is one
        return True


def end_with(parent: int) -> None:
    """Stop this process once its parent is gone: SIGTERM and, after torchrun's own grace time, a
    hard exit."""
    grace = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
