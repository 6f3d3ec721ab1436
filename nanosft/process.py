"""This process among others: requests to stop, a launcher that died, the other ranks."""

import math
import os
import signal
import threading
import time

import torch.distributed as dist

STARTED = time.monotonic()
GRACE = 30  # seconds from SIGTERM to a hard exit, as in torchrun
SIGNALED = 1 << 20  # more than there are ranks: their sum shows whether any rank got a signal


class Stop:
    """A request to stop after the current step: SIGTERM, Ctrl-C, or the end of --max_minutes."""

    def __init__(self):
        self.signal, self.since, self.deadline = 0, 0.0, math.inf
        self.agreed = 0  # the sum of asked() over the ranks in the last step

    def listen(self, max_minutes: float | None) -> None:
        """From now on, a signal is a request, and a second one ends the process at once."""
        if max_minutes is not None:
            self.deadline = STARTED + 60 * max_minutes
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        if self.signal and time.monotonic() - self.since > 1:  # schedulers may send one twice
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":  # print() must not be used in a handler
                os.write(2, b"\nstopping after this step; a second signal stops at once\n")

    def asked(self) -> int:
        return SIGNALED if self.signal else int(time.monotonic() > self.deadline)

    def exit_code(self) -> int:
        """128 + signal, also on a rank that did not get the signal itself; 0 for --max_minutes."""
        return 128 + (self.signal or signal.SIGTERM) if self.agreed >= SIGNALED else 0


def end_with(parent: int) -> None:
    """Stop this process once its parent is gone: SIGTERM, then a hard exit after GRACE seconds."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def gather(mine) -> list:
    """One object from each rank, in rank order."""
    if not dist.is_initialized():
        return [mine]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
