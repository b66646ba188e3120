"""What a trainer and an engine's host do about another side that is silent, rude or a stranger."""

import contextlib
import os
import pickle
import socket
import struct
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection

import numpy as np
import pytest
from vllm_double import KEY, HostThread

from nemo_care.errors import InputError, RunFailed
from nemo_care.rollouts.vllm import connections, host
from nemo_care.rollouts.vllm.connections import bound_sending, connect, greet
from nemo_care.rollouts.vllm.engine import Engine
from nemo_care.rollouts.vllm.messages import Call, EngineSettings, SampleRequest

SETTINGS = EngineSettings("/m", "float32", 1, 100, {}, "disk", 0.9, None, True, False)
REQUEST = SampleRequest("one", [5, 3], [], [], 2, 1.0, 1.0, 8, 1, [2])


@pytest.fixture
def engines(monkeypatch):
    """A host, and engines of trainers that connect to it."""
    double = HostThread(monkeypatch)
    made = []

    def engine(key=KEY, timeout=20.0):
        made.append(Engine("one", double.address, key, SETTINGS, timeout=timeout))
        made[-1].host = double
        return made[-1]

    yield engine
    for one in made:
        one.close()
    double.end()


def is_served(engine, seconds=5):
    began = time.monotonic()
    engine.begin()
    engine.ready()
    (reply,) = engine.ask("generate", requests=[REQUEST])
    assert len(reply.completions) == 2
    return time.monotonic() - began < seconds


def message(content):
    return struct.pack("!i", len(content)) + content


RUDE = {
    "nothing": b"",
    "half a length": b"\0\0",
    "half an answer": struct.pack("!i", 16) + b"12345678",
    "a wrong answer": message(b"x" * 16),
    "no answer": message(b""),
    "a long message": struct.pack("!i", 2**31 - 1) + b"x" * 1000,
    "a very long message": struct.pack("!iQ", -1, 2**62) + b"x" * 1000,
    "a negative length": struct.pack("!i", -7),
    "another protocol": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "a pickle": message(pickle.dumps(Call(0, "close", {}))),
    "garbage": bytes(range(256)) * 100,
}


@pytest.mark.parametrize("said", RUDE.values(), ids=RUDE)
@pytest.mark.parametrize("stays", [True, False], ids=["stays", "leaves"])
def test_a_stranger_neither_blocks_nor_ends_a_host(engines, capfd, said, stays):
    trainer = engines()
    with address(trainer) as (node, port):
        strangers = [socket.create_connection((node, port)) for _ in range(3)]
        with contextlib.suppress(OSError):
            for stranger in strangers:
                stranger.sendall(said)
        if not stays:
            for stranger in strangers:
                stranger.close()
        assert is_served(trainer)
        assert is_served(engines())
        for stranger in strangers:
            stranger.close()
    assert trainer.host.thread.is_alive()
    assert "Traceback" not in capfd.readouterr().err


@contextlib.contextmanager
def address(engine):
    node, port = connections.address_of(engine.address)
    yield node, port


def test_a_stranger_is_left_in_time_however_slowly_it_speaks(engines, monkeypatch):
    monkeypatch.setattr(connections, "GREETING_SECONDS", 0.5)
    trainer = engines()
    with address(trainer) as (node, port), socket.create_connection((node, port)) as stranger:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in message(b"x" * 200):
                stranger.sendall(bytes([byte]))
                time.sleep(0.1)
        assert time.monotonic() - began < 5
    assert is_served(trainer)


def test_more_strangers_than_a_host_listens_to_are_turned_away(engines, monkeypatch):
    monkeypatch.setattr(connections, "GREETING_SECONDS", 1.0)
    trainer = engines()
    with contextlib.ExitStack() as stack, address(trainer) as where:
        before = threading.active_count()
        for _ in range(3 * host._MOST_STRANGERS):
            stack.enter_context(socket.create_connection(where))
        # A thread and a timer each.
        assert threading.active_count() - before <= 2 * host._MOST_STRANGERS
        trainer.begin()  # turned away at first, and tries again
        trainer.ready()


def test_a_client_without_the_key_is_one_line_in_the_hosts_log(engines, capfd):
    trainer = engines()
    with pytest.raises(AuthenticationError):
        connect(trainer.address, b"another", 5)
    assert is_served(trainer)
    errors = capfd.readouterr().err
    assert errors.count("a client was turned away: digest received was wrong\n") == 1
    assert "Traceback" not in errors


class Unreadable:
    """Raises where it is unpickled, as what another version has sent."""

    def __reduce__(self):
        return os.listdir, ("/no/such/folder",)


@pytest.mark.parametrize("sent", [Unreadable(), {"no": "call"}, None], ids=["torn", "dict", "none"])
def test_a_trainer_that_sends_what_is_no_call_is_left(engines, sent):
    trainer = engines()
    stranger = connect(trainer.address, KEY.encode(), 5)
    stranger.send(sent)
    assert is_served(trainer)
    with pytest.raises((EOFError, OSError)):
        stranger.recv()


def test_a_trainer_that_takes_no_answers_is_left(engines, monkeypatch):
    """One that was stopped, or whose machine is gone: the others go on."""
    monkeypatch.setattr(host, "_SEND_SECONDS", 0.5)
    trainer = engines()
    deaf = connect(trainer.address, KEY.encode(), 5)
    deaf.send(Call(0, "open", {"settings": SETTINGS}))
    deaf.recv()
    large = SampleRequest("large", [5] * 300_000, [], [], 2, 1.0, 1.0, 8, 1, [2])
    deaf.send(Call(1, "generate", {"requests": [large] * 100}))
    time.sleep(0.5)
    # The double computes for some seconds; a host that waits for the deaf one waits a minute.
    assert is_served(trainer, seconds=30)
    deaf.close()


# ---------------------------------------------------------------------- the trainer's side


@pytest.fixture
def listening():
    """An address at which a function meets each client."""
    with contextlib.ExitStack() as stack:

        def listen(meet):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def accept():
                with contextlib.suppress(OSError):
                    while True:
                        client, _ = listener.accept()
                        stack.callback(client.close)
                        threading.Thread(target=meet, args=(client,), daemon=True).start()

            threading.Thread(target=accept, daemon=True).start()
            return f"127.0.0.1:{listener.getsockname()[1]}"

        yield listen


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"", "not greeted within"),
        (b"\0\0", "not greeted within"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "bad message length"),
        (message(b"welcome to another program"), "another program listens there"),
        (struct.pack("!iQ", -1, 2**62), "bad message length"),
    ],
)
def test_an_address_where_no_engine_answers_is_named(listening, said, why):
    where = listening(lambda client: client.sendall(said))
    engine = Engine("one", where, KEY, SETTINGS, timeout=1.0)
    began = time.monotonic()
    with pytest.raises(InputError, match=rf"rollout\.vllm\.hosts: no engine at {where} \(.*{why}"):
        engine.begin()
    assert time.monotonic() - began < 5


def test_an_engine_that_takes_no_requests_is_given_up(listening):
    def meet(client):
        greet(Connection(os.dup(client.fileno())), KEY.encode())

    engine = Engine("one", listening(meet), KEY, SETTINGS, timeout=1.0)
    engine.begin()
    large = SampleRequest("one", [5], [], [np.zeros(2**26, np.uint8)], 1, 1.0, 1.0, 8, 1, [2])
    message = r"has died: it took no request within rollout\.vllm\.timeout_seconds=1"
    with pytest.raises(RunFailed, match=message):
        engine.ask("generate", requests=[large])
    with pytest.raises(RunFailed, match=message):
        engine.ask("generate", requests=[REQUEST])


def test_a_bound_of_sending_has_fractions():
    ours, theirs = socket.socketpair()
    connection = Connection(ours.detach())
    bound_sending(connection, 0.25)
    began = time.monotonic()
    with pytest.raises(BlockingIOError), theirs:
        connection.send_bytes(bytes(2**24))
    assert 0.2 < time.monotonic() - began < 5
    connection.close()
