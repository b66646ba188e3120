"""Connections between trainers and engines, with bounds on what the other side may keep waiting.

Both sides show that they know the key before anything that they send is unpickled. Until then a
client may be anything that finds the port: it may say nothing, half of a message, or garbage.
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
"""In which both sides have to show that they know the key."""


def address_of(text: str) -> Any:
    """What multiprocessing calls an address: (node, port), or the path of a socket."""
    node, _, port = text.rpartition(":")
    return (node, int(port)) if node and port.isdigit() else text


def connect(address: str, key: bytes, seconds: float) -> Connection:
    """Connect to a host, in that time or GREETING_SECONDS.

    Raises:
        OSError: nobody listens (yet), or another program, or one that says nothing.
        EOFError: it has gone away.
        AuthenticationError: it has another key.
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
    """Let a client that has connected show that it knows the key, in GREETING_SECONDS.

    Raises:
        AuthenticationError: it has another key, or speaks another language.
        OSError, EOFError: it has gone away, or said nothing in time.
    """
    try:
        with _limited(client, GREETING_SECONDS):
            deliver_challenge(client, key)
            answer_challenge(client, key)
    except AssertionError:
        raise AuthenticationError("what it sent is no challenge") from None


def bound_sending(connection: Connection, seconds: float) -> None:
    """Let `send` raise BlockingIOError where the other side takes nothing for that time.

    The connection is of no use afterwards: a part of the message may have been taken.
    """
    whole, rest = divmod(seconds, 1)
    with _socket_of(connection) as shared:
        shared.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(whole), int(rest * 1e6))
        )


def hang_up(connection: Connection) -> None:
    """End a connection under whoever reads from it or writes to it, who finds its end."""
    with contextlib.suppress(OSError), _socket_of(connection) as shared:
        shared.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _limited(connection: Connection, seconds: float) -> Iterator[None]:
    """Hang up after that time, however slowly the other side sends. Raises TimeoutError."""
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
