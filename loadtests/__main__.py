"""`python -m loadtests`: Locust with our file.

Its `--help` has our options, which `locust -f loadtests/locustfile.py --help` cannot have: Locust 2.47 prints its help
before it reads any file.
"""

import sys
from pathlib import Path

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def main() -> None:
    """Hand the command line to Locust."""
    if {"-h", "--help"} & set(sys.argv):
        import loadtests.locustfile  # noqa: F401  (which Locust then does not load again)
    from locust.main import main as locust

    sys.argv[1:1] = ["-f", str(LOCUSTFILE)]
    locust()


if __name__ == "__main__":
    main()
