"""Shared by the tests that kill: what runs on this machine, read from /proc."""

from pathlib import Path


def stat(pid) -> list[str]:
    """State and parent of a process, with what follows them in /proc/PID/stat."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it is gone
        return ["Z", "0"]


def is_alive(pid: int) -> bool:
    """False for a zombie as well."""
    return stat(pid)[0] != "Z"


def children_of(parent: int) -> list[int]:
    """In the order in which they were started."""
    pids = sorted(int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [pid for pid in pids if stat(pid)[1] == str(parent)]
