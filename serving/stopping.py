"""Whether this process was told to stop, so that a server that ends by itself can be told from one that was ended."""


class Stopping:
    """Told by a signal."""

    told = False


stopping = Stopping()
