"""Beside our Locust file: what takes this process's time, 20 of every 25 ms, so that it comes late to all streams."""

import time

import gevent
from locust import events


@events.test_start.add_listener
def _hold_up(**_) -> None:
    def hog() -> None:
        while True:
            end = time.perf_counter() + 0.02
            while time.perf_counter() < end:
                pass
            gevent.sleep(0.005)

    gevent.spawn(hog)
