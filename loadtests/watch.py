"""The client's own account: by how much its times may be wrong.

Whatever a stream brings is noted once this process comes to it. How long that takes is measured all the time: a
greenlet asks to be woken every few milliseconds, and notes how late that was. So other streams, a busy machine and
Python itself count, and a server that is late does not. Late sends and processor time are noted too.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import gevent
import numpy as np

TICK = 0.005
BOUND = 0.002
"""Seconds at the median by which times may be wrong, or else a run is void."""
BUSY = 0.5
"""The part of a core up to which one process keeps within the bound: to say how many are needed."""


@dataclass(frozen=True)
class Client:
    """What one process, or several, say of a run; seconds."""

    lag: tuple[float, float]
    """How late it came to what was ready: the median and the 95th percentile."""
    late: tuple[float, float]
    """How late requests were sent."""
    cpu: float
    """Processor time, as a part of a core's."""
    processes: int = 1

    @property
    def off(self) -> float:
        """By how much its times may be wrong, at the median."""
        return max(self.lag[0], self.late[0])

    def void(self, bound: float) -> str:
        """Why the run says nothing of the server, or nothing where it does."""
        if self.off <= bound:
            return ""
        needed = max(math.ceil(self.processes * max(self.cpu / BUSY, self.off / bound / 2)), self.processes + 1)
        what = f"its times may be wrong by {self.off * 1000:.1f} ms at the median, and {bound * 1000:g} are allowed"
        return f"the client is too slow: {what} (CPU {self.cpu:.0%}); take some {needed} workers, or ask for less"


class Watch:
    """Watches this process from its making on."""

    def __init__(self) -> None:
        self.lags, self.late = list[float](), list[float]()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        while True:
            due = time.perf_counter() + TICK
            gevent.sleep(TICK)
            self.lags.append(time.perf_counter() - due)

    def stop(self) -> Client:
        """What was seen."""
        self.greenlet.kill()
        cpu = (time.process_time() - self.cpu) / max(time.perf_counter() - self.wall, 1e-9)
        return Client(two(self.lags), two(self.late), cpu)


def together(clients: Sequence[Client]) -> Client:
    """Of the processes of one run: the slowest tells."""
    return Client(
        max(each.lag for each in clients),
        max(each.late for each in clients),
        max(each.cpu for each in clients),
        sum(each.processes for each in clients),
    )


def two(values: Sequence[float]) -> tuple[float, float]:
    """The median and the 95th percentile; 0 where there is nothing."""
    if not values:
        return (0.0, 0.0)
    median, high = np.quantile(values, (0.5, 0.95))
    return max(float(median), 0.0), max(float(high), 0.0)
