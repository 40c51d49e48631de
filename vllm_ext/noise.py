"""What vLLM and what it imports print, kept from standing before and after a line of ours."""

import atexit
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

STREAMS = (1, 2)


@contextmanager
def held(dropped: type[BaseException], enabled: bool = True) -> Iterator[None]:
    """Hold back what the block prints, from C too, and print it at its end, unless it raises `dropped`."""
    if not enabled:
        yield
        return
    shown, replay = [os.dup(stream) for stream in STREAMS], True
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        _redirect([out.fileno(), err.fileno()])
        try:
            yield
        except dropped:
            replay = False
            raise
        finally:
            _redirect(shown)
            for stream, file, each in zip(STREAMS, (out, err), shown, strict=True):
                os.close(each)
                if replay:
                    file.seek(0)
                    os.write(stream, file.read())


def _redirect(to: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for stream, target in zip(STREAMS, to, strict=True):
        os.dup2(target, stream)


def end_quietly() -> None:
    """Let nothing be printed once this process begins to exit."""

    def silence() -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        _redirect([nowhere] * len(STREAMS))

    atexit.register(silence)
