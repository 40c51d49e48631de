"""A ramp of users: `locust -f loadtests/locustfile.py,loadtests/ramp.py --host URL --headless`."""

from typing import Any

from locust import LoadTestShape, events
from locust.argument_parser import LocustArgumentParser


@events.init_command_line_parser.add_listener
def _options(parser: LocustArgumentParser) -> None:
    add = parser.add_argument
    add("--ramp-from", type=int, default=1, help="Users of the first step.")
    add("--ramp-to", type=int, default=32, help="Users of the last.")
    add("--ramp-steps", type=int, default=6, help="How many steps.")
    add("--ramp-seconds", type=float, default=30.0, help="How long each lasts.")


class Ramp(LoadTestShape):
    """From few users to many, in even steps; then it ends."""

    def tick(self) -> tuple[int, float] | None:
        """Users now, and how many to start a second."""
        assert self.runner is not None
        options: Any = self.runner.environment.parsed_options
        step = int(self.get_run_time() / options.ramp_seconds)
        if step >= options.ramp_steps:
            return None
        rise = (options.ramp_to - options.ramp_from) * step / max(options.ramp_steps - 1, 1)
        users = round(options.ramp_from + rise)
        return users, max(users, 1)
