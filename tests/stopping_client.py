"""Beside our Locust file: what ends the run while the rows of its first answer are written."""

import gevent
from locust import events


@events.init.add_listener
def _end_amidst_rows(environment, **_) -> None:
    def at_first(request_type: str, **_) -> None:
        if request_type == "POST":
            gevent.spawn(end)

    def end() -> None:
        environment.runner.user_greenlets.kill()
        environment.runner.quit()

    environment.events.request.add_listener(at_first)
