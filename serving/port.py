"""Whether a server can listen where it is to."""

import socket

import psutil

from vllm_ext.errors import UsageError


def check_port(host: str, port: int) -> None:
    """Raise UsageError where the port is taken: vLLM shares a listening port and would not notice."""
    if not 0 < port < 2**16:
        raise UsageError(f"--port {port}: no such port; choose one of 1-65535")
    # A server that is still starting holds its port without listening, which only a strict bind notices. That one also
    # minds the connections of a server that has ended, for a minute.
    lingering = any(
        connection.laddr.port == port and connection.status == psutil.CONN_TIME_WAIT
        for connection in psutil.net_connections("tcp")
    )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, lingering)
            probe.bind(address)
    except OSError as error:
        raise UsageError(f"--port {port}: cannot listen on {host} ({error.strerror}); choose another") from error
