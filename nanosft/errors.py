"""What a user can get wrong, in one line; and safe writes. Nothing here needs PyTorch or NumPy."""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Something the user can fix. The message names the file, row, or flag, and what to do."""


def require_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise UserError(f"--{name}: unknown {name} {value!r}; choose from {list(choices)}")


def one_line(message: str) -> str:
    r"""A message without control characters and in at most 300 characters, besides the user's own
    arguments in it. The middle is cut: the place stands at its start, what to do at its end.

    >>> one_line("a.jsonl line 3: \x1b[2J is not a role")
    'a.jsonl line 3: \\x1b[2J is not a role'
    """
    limit = 300 + sum(len(word) for word in set(sys.argv[1:]) if word in message)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    return shown if len(shown) <= limit else f"{shown[: limit - 143]} … {shown[-140:]}"


@contextlib.contextmanager
def explain_write_errors(path: Path, advice: str = "free some space and run the command again",
                         ) -> Iterator[None]:
    """A failed write to `path`, such as on a full disk, becomes a UserError with its name.

    Of these errors NumPy's has no errno, torch's is a RuntimeError, safetensors' its own class.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError)
                or re.search("os error|PytorchStreamWriter|unexpected pos", str(error))):
            raise
        reason = getattr(error, "strerror", None) or "cannot be written"
        raise UserError(f"{path}: {reason} ({free_bytes(path) / 1e6:,.1f} MB free); {advice}"
                        ) from error


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it at the end; on any error it is deleted."""
    tmp = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield tmp
        flush(tmp)
        tmp.replace(path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """fsync a file or folder: its contents must reach the disk before a rename does."""
    is_folder = path.is_dir()
    try:
        # Windows cannot open folders, nor flush what is open for reading
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # a full or broken disk is still an error
        if not is_folder or error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def to_json(value, **options) -> str:
    """JSON text. Infinity and NaN, which JSON does not have, become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(finite, **options)


def write_json(path: Path, content: dict) -> None:
    path.write_text(to_json(content, indent=1) + "\n", "utf-8")


def free_bytes(path: Path) -> int:
    """Free space on the disk of `path`, which need not exist."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
