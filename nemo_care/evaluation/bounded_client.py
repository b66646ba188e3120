"""A client of OpenAI-compatible endpoints that limits the time and the size of each reply.

The package openai limits the silence between two pieces of a reply, but neither the total time nor
the size: an endpoint that sends a byte now and then blocks a request forever, and a small
compressed reply can fill the memory.
"""

import asyncio
import importlib
import threading
from typing import Any

MOST_BYTES = 4 * 2**20
"""Size limit of one reply. The longest chat completions have some hundred thousand bytes."""

ODD_REPLY = "nemo_care.odd_reply"
"""The extension of a response without a body, with the reason why it was not read."""

_NO_LONGER_TRUE = ("content-encoding", "content-length", "content-type", "transfer-encoding")


class BoundedClient:
    """Makes requests in its own event loop; any thread can call it, and waits.

    A request is ended on time by cancelling it, whether it is connecting, waiting for headers or
    reading.
    """

    def __init__(self, *, base_url: str | None, key: str, max_retries: int, seconds: float) -> None:
        """Limit an attempt to `seconds`, from connecting to the reply's last byte.

        Raises:
            ImportError: the package openai is missing.
        """
        from openai import AsyncOpenAI, Timeout

        self._loop = asyncio.new_event_loop()
        # A request that hangs must not delay the interpreter's exit.
        self._thread = threading.Thread(
            target=self._loop.run_forever, daemon=True, name="llm-endpoint"
        )
        self._thread.start()
        self._openai = AsyncOpenAI(
            base_url=base_url,
            # Without a key, openai would use OPENAI_API_KEY, which is not for this endpoint.
            api_key=key or "none",
            max_retries=max_retries,
            # An unreachable address is a different fault than a slow model.
            timeout=Timeout(seconds, connect=seconds / 2),
            default_headers={"Accept-Encoding": "identity"},
            http_client=_bounded_http_client(seconds),
        )

    def chat(self, **request: Any) -> Any:
        """Return the response to a chat completion request, whatever its content.

        Its extensions contain ODD_REPLY if the reply was larger than MOST_BYTES, or compressed.
        Raises openai's exceptions.
        """
        return asyncio.run_coroutine_threadsafe(self._chat(request), self._loop).result()

    async def _chat(self, request: dict[str, Any]) -> Any:
        # Raw, because the caller handles responses that are not chat completions.
        raw = self._openai.chat.completions.with_raw_response
        return (await raw.create(**request)).http_response

    def close(self) -> None:
        """Close the connections; no request is possible afterwards."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._openai.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _bounded_http_client(seconds: float) -> Any:
    from openai import DefaultAsyncHttpxClient

    # httpx or its successor, whichever openai uses; they have the same interface.
    base = next(kind for kind in DefaultAsyncHttpxClient.__mro__ if kind.__name__ == "AsyncClient")
    httpx = importlib.import_module(base.__module__.partition(".")[0])

    class Bounded(DefaultAsyncHttpxClient):
        async def send(self, request: Any, *, stream: bool = False, **more: Any) -> Any:
            try:
                async with asyncio.timeout(seconds):
                    response = await super().send(request, stream=True, **more)
                    try:
                        body, odd = await _body(response)
                    finally:
                        await response.aclose()
            except TimeoutError:
                # An exception that makes openai retry.
                raise httpx.ReadTimeout(
                    f"no whole reply within evaluation.llm.timeout_seconds={seconds:g}",
                    request=request,
                ) from None
            headers = {k: v for k, v in response.headers.items() if k not in _NO_LONGER_TRUE}
            return httpx.Response(
                response.status_code,
                # JSON is UTF-8, whatever charset the endpoint declares.
                headers={**headers, "content-type": "application/json"},
                content=body,
                request=request,
                extensions={ODD_REPLY: odd} if odd else {},
            )

    # The body of a redirect would be read without limits.
    return Bounded(follow_redirects=False)


async def _body(response: Any) -> tuple[bytes, str]:
    """Read the body of a response, or return nothing and the reason why it was not read."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        return b"", f"a compressed reply ({encoding[:20]}), which was not requested"
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > MOST_BYTES:
            return b"", f"a reply of more than {MOST_BYTES >> 20} MiB"
    return bytes(body), ""
