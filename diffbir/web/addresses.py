"""Keeps the server from fetching what a visitor names by an address: only what was uploaded is opened."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

LIMIT = 1 << 20  # bytes of a request that isn't an upload
ADDRESS = "://"

Message = dict[str, Any]


class NoAddresses:
    """ASGI middleware: Gradio would fetch a file whose `path` is an address, and pass on `/file=http://...`."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if "=http" in scope["path"].lower():
            return await refuse(send)
        if scope["method"] == "POST" and not is_upload(scope):
            body, more = b"", True
            while more and len(body) <= LIMIT:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > LIMIT or names_address(body):
                return await refuse(send)
            receive = again(body, receive)
        await self.app(scope, receive, send)


def is_upload(scope: dict[str, Any]) -> bool:
    return dict(scope["headers"]).get(b"content-type", b"").startswith(b"multipart/form-data")


def names_address(body: bytes) -> bool:
    """Whether JSON has an address, or anything but text, for a `path` anywhere in it."""
    try:
        value = json.loads(body)
    except ValueError:  # which Gradio will refuse
        return False
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            path = value.get("path", "")
            if path is not None and (not isinstance(path, str) or ADDRESS in path):
                return True
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    return False


def again(body: bytes, receive: Callable[[], Awaitable[Message]]) -> Callable[[], Awaitable[Message]]:
    """What has been read, and then whatever follows it."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


async def refuse(send: Callable[[Message], Awaitable[None]]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    text = json.dumps({"detail": "only uploaded pictures are opened, no addresses"})
    await send({"type": "http.response.body", "body": text.encode()})
