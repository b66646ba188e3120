"""A chat endpoint on this machine with a test's replies, and the requests that judges send."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread

from nemo_care.data.samples import Sample
from nemo_care.evaluation.judges import Verdict
from nemo_care.evaluation.llm_judge import LLMJudge

KEY = "sk-the-secret-0123456789"
SAMPLE = Sample("7", "Which way does it go?", "B", options={"A": "left", "B": "right"})
PATIENCE = 100.0  # seconds, for a loaded machine; nothing here takes as long

Response = tuple[int, dict[str, str], str | bytes]
"""Status, headers, and body."""

SOON = {"retry-after-ms": "1"}


def completion(number: int = 0) -> str:
    return f"<think> it moves right, {number} </think> <answer> B </answer>"


def ask(judge: LLMJudge, *texts: str) -> list[Verdict]:
    futures = [judge.submit(SAMPLE, text) for text in texts or (completion(),)]
    return [future.result(timeout=PATIENCE) for future in futures]


def says(text: str | None, finish_reason: str = "stop") -> Response:
    """Return a chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return 200, {}, json.dumps(body)


def refuses(status: int, message: str = "no", headers: dict[str, str] | None = None) -> Response:
    """Return an error in OpenAI's format."""
    return status, headers or {}, json.dumps({"error": {"message": message, "code": None}})


class Endpoint:
    """`answer` makes the reply to a request's body; `released` is set at the end of the test."""

    def __init__(self) -> None:
        self.answer: Callable[[dict], Response] = lambda request: says("CONSISTENT")
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.released = Event()
        self.lock = Lock()
        self.url = ""

    def texts(self) -> list[str]:
        """Return the texts of the requests, in order of arrival."""
        return [request["messages"][0]["content"] for request in self.requests]

    def wait_for(self, reached: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Return whether `reached` became true in that time."""
        end = time.monotonic() + seconds
        while not reached() and time.monotonic() < end:
            time.sleep(0.002)
        return reached()


@contextmanager
def serving() -> Iterator[Endpoint]:
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                endpoint.requests.append(request)
                endpoint.headers.append(
                    {name.lower(): value for name, value in self.headers.items()}
                )
                endpoint.in_flight += 1
                endpoint.most_in_flight = max(endpoint.most_in_flight, endpoint.in_flight)
            status, headers, body = endpoint.answer(request)
            with endpoint.lock:
                endpoint.in_flight -= 1
            self.send_response(status)
            content = body.encode() if isinstance(body, str) else body
            kind = "application/json" if content.startswith(b"{") else "text/html"
            for name, value in {"Content-Type": kind, **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *arguments: object) -> None:
            """Ignore a client that has disconnected: killed, or timed out."""

    server = Server(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def dribbling(response: bytes, pause: float) -> Iterator[str]:
    """Serve an endpoint that sends its reply one byte at a time; yield its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = Event()

    def dribble(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            for place in range(len(response)):
                connection.sendall(response[place : place + 1])
                if ended.wait(pause):
                    return

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                Thread(target=dribble, args=(connection,), daemon=True).start()

    Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
