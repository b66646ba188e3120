"""Entry of `nemo-care view`: pages that show a run's completions, and a server for them."""

import argparse
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from nemo_care.errors import InputError
from nemo_care.process.screen import say

if TYPE_CHECKING:
    from nemo_care.reporting.view.pages import View

_ADDRESS = "127.0.0.1"
_PORT = 8765


def main(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care view`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="nemo-care view",
        description="Write pages that show a run's completions: questions with the frames that the "
        "model saw, reasoning, answers, rewards, likelihoods, advantages. They open from a file.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--other", type=Path, metavar="RUN2", help="another run, to be shown beside it"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the pages go (default: RUN/view)"
    )
    parser.add_argument(
        "--media",
        type=int,
        default=200,
        metavar="N",
        help="draw the frames of at most N more videos and images, the newest steps first "
        "(default: 200); --serve draws the others when they are looked at",
    )
    parser.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=_PORT,
        metavar="PORT",
        help=f"then serve the pages on {_ADDRESS}, for a browser on another machine through an ssh "
        f"tunnel (default: port {_PORT}; 0: any free one); Ctrl-C ends it",
    )
    options = parser.parse_args(arguments)
    from nemo_care.ranks.launch import guarded

    return guarded(_main, options)


def _main(options: argparse.Namespace) -> None:
    from nemo_care.reporting.view.pages import write_view

    if options.media < 0:
        raise InputError(f"--media {options.media}: must be 0 or more")
    view = write_view(
        options.run, options.other, options.out or options.run / "view", options.media
    )
    text = f"{view.completions:,} completions; frames of {view.drawn:,} videos and images"
    if view.missing:
        text += f", {view.missing:,} can't be drawn"
    if view.left:
        text += f", {len(view.left):,} not drawn yet (--media {len(view.left)} draws them)"
    say(text)
    say(view.page)
    if options.serve is not None:
        serve(view, options.serve)


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder to this machine's own browser, and draws missing frames on request."""

    def __init__(self, view: "View", drawing: Lock, *arguments: Any) -> None:
        self.view = view
        self.drawing = drawing
        super().__init__(*arguments, directory=str(view.folder))

    def send_head(self) -> Any:
        """Answer GET and HEAD."""
        # A page of the internet must not read this by resolving its own name to this address.
        host = self.headers.get("Host", "").split(":")[0]
        if host not in (_ADDRESS, "localhost"):
            self.send_error(403, "this server answers to localhost and 127.0.0.1")
            return None
        sheet = self.view.left.get(self.path.rpartition("/media/")[2])
        if sheet is not None:
            with self.drawing:
                sheet.draw(self.view.folder / "media")
        return super().send_head()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print no requests."""


def serve(view: "View", port: int) -> None:
    """Serve the pages on 127.0.0.1 until Ctrl-C.

    Raises:
        InputError: the port is taken, or no port.
    """
    try:
        server = ThreadingHTTPServer((_ADDRESS, port), partial(_Handler, view, Lock()))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "not a port"
        raise InputError(f"--serve {port}: {reason}; choose another port, or 0") from error
    with server:
        port = server.server_address[1]
        tunnel = f"ssh -L {port}:{_ADDRESS}:{port} HOST"
        say(f"http://{_ADDRESS}:{port}/ (from another machine: {tunnel})")
        server.serve_forever()
