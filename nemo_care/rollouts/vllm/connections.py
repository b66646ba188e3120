"""Connections between trainers and engines, with limits on how long the peer can block.

Both sides prove that they have the key before any message is unpickled. Until then, a client can
be any program that finds the port: it may send nothing, half of a message, or garbage.
"""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

GREETING_SECONDS = 10.0
"""The time in which both sides have to prove that they have the key."""


def address_of(text: str) -> Any:
    """Return an address in multiprocessing's form: (node, port), or the path of a socket."""
    node, _, port = text.rpartition(":")
    return (node, int(port)) if node and port.isdigit() else text


def connect(address: str, key: bytes, seconds: float) -> Connection:
    """Connect to a host within `seconds` or GREETING_SECONDS, whichever is less.

    Raises:
        OSError: nothing listens there (yet), or it is another program, or it sends nothing.
        EOFError: the host has disconnected.
        AuthenticationError: it has a different key.
    """
    seconds = min(seconds, GREETING_SECONDS)
    where = address_of(address)
    if isinstance(where, tuple):
        connected = socket.create_connection(where, timeout=seconds)
    else:
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.settimeout(seconds)
            connected.connect(where)
        except BaseException:
            connected.close()
            raise
    connected.settimeout(None)
    connection = Connection(connected.detach())
    try:
        with _limited(connection, seconds):
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
    except AssertionError:
        connection.close()
        raise OSError("another program listens there") from None
    except BaseException:
        connection.close()
        raise
    return connection


def greet(client: Connection, key: bytes) -> None:
    """Authenticate a client that has connected, within GREETING_SECONDS.

    Raises:
        AuthenticationError: it has a different key, or uses a different protocol.
        OSError, EOFError: it has disconnected, or sent nothing in time.
    """
    try:
        with _limited(client, GREETING_SECONDS):
            deliver_challenge(client, key)
            answer_challenge(client, key)
    except AssertionError:
        raise AuthenticationError("its message is not a challenge") from None


def bound_sending(connection: Connection, seconds: float) -> None:
    """Make `send` raise BlockingIOError if the peer receives nothing for that time.

    The connection is unusable afterwards, because part of the message may have been received.
    """
    whole, rest = divmod(seconds, 1)
    with _socket_of(connection) as shared:
        shared.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(whole), int(rest * 1e6))
        )


def hang_up(connection: Connection) -> None:
    """Close a connection, so that threads that read from it or write to it find its end."""
    with contextlib.suppress(OSError), _socket_of(connection) as shared:
        shared.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _limited(connection: Connection, seconds: float) -> Iterator[None]:
    """Close the connection after that time, however slowly data arrives. Raises TimeoutError."""
    late = threading.Event()

    def end() -> None:
        late.set()
        hang_up(connection)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, EOFError):
        if late.is_set():
            raise TimeoutError(f"connected, but not greeted within {seconds:g} s") from None
        raise
    finally:
        timer.cancel()


def _socket_of(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))
