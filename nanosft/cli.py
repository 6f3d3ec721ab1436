"""The command line of every script: flags from a dataclass, and one-line user errors."""

import datetime
import errno
import os
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Something the user can fix. The message names the file, row or flag, and what to do."""


def run_cli(main: Callable, config_class: type) -> None:
    """Parse the flags into `config_class` and call main(config).

    A UserError, an OSError on a file, or a lost rank prints one line and exits with code 2.
    Anything else is our bug and keeps its traceback.
    """
    import tyro

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


def exit_with(message: str) -> NoReturn:
    """Print `error: message`, once for all ranks with the same message; exit with code 2."""
    message = one_line(message)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1 or is_first_to_report(message):
        where = f" (rank {rank} on {socket.gethostname()})" if rank else ""
        print(f"error: {message}{where}", file=sys.stderr, flush=True)
    sys.exit(2)


def is_first_to_report(message: str) -> bool:
    """True on exactly one of the ranks that hit the same error: they count in torchrun's store.

    If the store cannot be reached, every rank reports: repeated lines are better than none.
    """
    from torch.distributed import TCPStore

    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", 29500)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    try:
        timeout = datetime.timedelta(seconds=5)
        store = TCPStore(address, int(port), is_master=False, timeout=timeout)
        return store.add(f"nanosft error, attempt {attempt}: {message}", 1) == 1
    except RuntimeError:  # torch.distributed.DistError is a subclass
        return True


def is_lost_rank(error: RuntimeError) -> bool:
    """Is this how NCCL or Gloo reports that another rank is gone?"""
    from torch.distributed import DistError

    gloo = "gloo" in str(error).lower() or "Connection closed by peer" in str(error)
    return isinstance(error, DistError) or gloo
