"""The command line of every script: flags from a dataclass, and one-line user errors."""

import contextlib
import datetime
import errno
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from nanosft.process import end_with

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Something the user can fix. The message names the file, row or flag, and what to do."""


def run_cli(main: Callable, config_class: type) -> None:
    """Parse the flags into `config_class` and call main(config).

    A UserError, an OSError on a file, or a lost rank prints one line and exits with code 2.
    Anything else is our bug and keeps its traceback.
    """
    import tyro

    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this process
        end_with(os.getppid())
    try:
        try:
            main(tyro.cli(config_class, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
        finally:
            sys.stdout.flush()  # here, where a closed pipe is caught
    except UserError as error:
        exit_with(str(error))
    except BrokenPipeError:  # the reader, for example `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
    except OSError as error:
        if error.filename is None and error.errno not in NO_SPACE:
            raise
        name = f"{error.filename}: " if error.filename is not None else ""
        exit_with(f"{name}{error.strerror}")
    except KeyboardInterrupt:
        exit_with("interrupted", 130)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        exit_with("lost the connection to another rank: it failed, or its machine is down; see its "
                  "output")


def require_choice(name: str, value, choices) -> None:
    """UserError unless `value` is one of the choices."""
    if value not in choices:
        raise UserError(f"--{name}: unknown {name} {value!r}; choose from {list(choices)}")


def require_at_least(config, least: int, *names: str, most: float = 2**62) -> None:
    """UserError if one of these flags is set and not from `least` to `most`; nan never is."""
    for name in names:
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and not least <= value <= most:
                limit = f" and at most {most:g}" if value > most else ""
                raise UserError(f"--{name} {value} must be at least {least}{limit}")


def one_line(message: str) -> str:
    r"""A message without control characters and in at most 300 characters, besides the user's own
    arguments in it. The middle is cut: the place stands at its start, what to do at its end.

    >>> one_line("a.jsonl line 3: \x1b[2J is no role")
    'a.jsonl line 3: \\x1b[2J is no role'
    """
    limit = 300 + sum(len(word) for word in set(sys.argv[1:]) if word in message)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    return shown if len(shown) <= limit else f"{shown[: limit - 143]} … {shown[-140:]}"


def minutes(name: str, value: float) -> datetime.timedelta:
    """UserError unless `value` is a time from above 0 to 10 years."""
    if not 0 < value < 5_000_000:
        raise UserError(f"--{name} {value} must be more than 0 and less than 5,000,000 minutes")
    return datetime.timedelta(minutes=value)


@contextlib.contextmanager
def explain_write_errors(path: Path, advice: str = "free some space and run the command again",
                         ) -> Iterator[None]:
    """A failed write to `path`, such as on a full disk, becomes a UserError with its name.

    Of these errors NumPy's has no errno, torch's is a RuntimeError, safetensors' its own class.
    """
    try:
        yield
    except Exception as error:
        its_own = ("os error", "PytorchStreamWriter", "unexpected pos")
        if not isinstance(error, OSError) and not any(words in str(error) for words in its_own):
            raise
        reason = getattr(error, "strerror", None) or "cannot be written"
        raise UserError(f"{path}: {reason} ({free_bytes(path) / 1e6:,.1f} MB free); {advice}"
                        ) from error


def free_bytes(path: Path) -> int:
    """Free space on the disk of `path`, which need not exist."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


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
    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", 29500)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    try:
        timeout = datetime.timedelta(seconds=5)
        store = dist.TCPStore(address, int(port), is_master=False, timeout=timeout)
        return store.add(f"nanosft error, attempt {attempt}: {message}", 1) == 1
    except RuntimeError:  # torch.distributed.DistError is a subclass
        return True


def is_lost_rank(error: RuntimeError) -> bool:
    """Is this how NCCL or Gloo reports that another rank is gone?"""
    gloo = "gloo" in str(error).lower() or "Connection closed by peer" in str(error)
    return isinstance(error, dist.DistError) or gloo
