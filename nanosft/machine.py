"""Work that one rank of a machine does for all of them."""

import contextlib
import datetime
import os
import time
from collections.abc import Iterator


def open_store(seconds: float):
    """A client of torchrun's key-value store, or None if there is none within these seconds."""
    from torch.distributed import TCPStore

    try:
        return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                        timeout=datetime.timedelta(seconds=seconds))
    except (KeyError, RuntimeError):  # torch.distributed.DistError is a RuntimeError
        return None


@contextlib.contextmanager
def first_on_machine(work: str) -> Iterator[bool]:
    """Yields False on the first of a machine's ranks to get here. The others wait until it is done,
    even beyond --dist_timeout, and then get True, or False if it failed.

    It need not be local rank 0, which may itself be waiting for a rank that would wait for it here.
    """
    has_others = os.environ.get("LOCAL_WORLD_SIZE", "1") != "1"
    store = open_store(30) if has_others else None
    machine, start = (os.environ.get(name, "0") for name in ("GROUP_RANK",
                                                             "TORCHELASTIC_RESTART_COUNT"))
    key, is_done = f"{work}, machine {machine}, start {start}", False
    if store and store.add(f"{key}, ranks", 1) > 1:
        while not store.check([key]):  # store.wait would not let a signal through
            time.sleep(0.05)
        yield store.get(key) == b"True"
        return
    try:
        yield False
        is_done = True
    finally:
        if store:
            with contextlib.suppress(RuntimeError):  # the rank that holds the store is gone
                store.set(key, str(is_done))
