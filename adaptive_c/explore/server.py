"""The server of the page: on 127.0.0.1 only, for its own pages only, until Ctrl-C."""

import asyncio
import logging
import signal
import time
import webbrowser
from collections.abc import Awaitable
from socket import create_server
from typing import Any

from bokeh.application import Application
from bokeh.application.handlers.function import FunctionHandler
from bokeh.document import Document
from bokeh.document.events import DocumentPatchedEvent
from bokeh.server.connection import ServerConnection
from bokeh.server.server import BaseServer
from bokeh.server.tornado import BokehTornado
from bokeh.util.token import get_session_id, get_token_payload
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.web import ErrorHandler
from tornado.websocket import WebSocketHandler

from .page import show

ADDRESS = "127.0.0.1"
PAUSE = 5  # milliseconds, in which the changes that have come during the last drawing are read


class WholeConnection(ServerConnection):
    """A browser's connection that is sent all that has changed together as one message.

    Bokeh would send a message for each property.  The browser would begin to draw when it has the first of them, and
    would draw some figures again when it has the others.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.unsent: list[DocumentPatchedEvent] = []

    def send_patch_document(self, event: DocumentPatchedEvent) -> Awaitable[None]:
        """Keep the message until all of one change can be sent at once."""
        self.unsent.append(event)
        return self._send()

    async def _send(self) -> None:
        """Bokeh awaits this once for each property when all are changed; the first time sends all of them."""
        if self.unsent:
            events, self.unsent = self.unsent, []
            await self._socket.send_message(self.protocol.create("PATCH-DOC", events))


class LocalTornado(BokehTornado):
    """Bokeh's server, which refuses what another site may have sent or could read.

    A page of another site can send requests to this address.  If a name of that site leads here, the page could even
    read the answers.  The header Origin, and what browsers say of a request, tell the first; the header Host tells the
    second.
    """

    def __init__(self, applications: dict[str, Application], port: int) -> None:
        self.hosts = [f"{name}:{port}" for name in (ADDRESS, "localhost")]
        super().__init__(applications, extra_websocket_origins=self.hosts)

    def find_handler(self, request: HTTPServerRequest, **more: Any) -> Any:
        """Answer 403 to requests of other sites, and the usual handler to all others."""
        if self._is_foreign(request) or (request.path.endswith("/ws") and not self._is_page(request)):
            return self.get_handler_delegate(request, ErrorHandler, {"status_code": 403})
        return super().find_handler(request, **more)

    def new_connection(self, protocol: Any, socket: WebSocketHandler, *more: Any) -> ServerConnection:
        """A connection that sends at once all that one change has caused."""
        if socket.ws_connection is not None:  # or the browser has already gone
            socket.set_nodelay(True)  # a message is many small packets, of which TCP would hold some back for others
        connection = WholeConnection(protocol, socket, *more)
        self._clients.add(connection)
        return connection

    def _is_foreign(self, request: HTTPServerRequest) -> bool:
        """Whether a request comes from another site, by its headers."""
        headers = request.headers
        if headers.get("Host") not in self.hosts:
            return True
        if "Origin" in headers and headers["Origin"] not in [f"http://{host}" for host in self.hosts]:
            return True
        # A link in another site's page may be followed, but nothing of this one may be built into it.
        cross = headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        return cross and headers.get("Sec-Fetch-Dest") != "document"

    def _is_page(self, request: HTTPServerRequest) -> bool:
        """Whether a websocket comes from a page that was served here; for any other, Bokeh would print a traceback."""
        try:
            protocol, token = (part.strip() for part in request.headers["Sec-WebSocket-Protocol"].split(","))
            current = time.time() < get_token_payload(token)["session_expiry"]
            return current and protocol == "bokeh" and bool(get_session_id(token))
        except (KeyError, ValueError, TypeError, AttributeError):
            return False


def _application() -> Application:
    """What Bokeh serves: a page for each visitor, in the state that the link describes."""

    def page(document: Document) -> None:
        arguments = document.session_context.request.arguments
        show(document, {key: values[-1].decode("utf-8", "replace") for key, values in arguments.items()},
             lambda call: document.add_timeout_callback(call, PAUSE))  # fmt: skip

    return Application(FunctionHandler(page))


def serve(port: int, browser: bool) -> None:
    """Serve the page until Ctrl-C or SIGTERM.  Raises OSError if the port can't be used."""
    socket = create_server((ADDRESS, port))
    socket.setblocking(False)
    port = socket.getsockname()[1]
    loop = IOLoop.current()
    tornado = LocalTornado({"/": _application()}, port)
    http = HTTPServer(tornado)
    http.add_socket(socket)
    server = BaseServer(loop, tornado, http)
    logging.getLogger("bokeh").setLevel(logging.ERROR)  # it warns whenever a browser closes a page
    server.start()
    for name in (signal.SIGINT, signal.SIGTERM):  # not as an exception, which would come in the middle of something
        asyncio.get_event_loop().add_signal_handler(name, loop.stop)
    url = f"http://{ADDRESS}:{port}/"
    print(f"the explorer is at {url}; Ctrl-C ends it", flush=True)
    if browser:
        webbrowser.open(url)
    loop.start()
    server.stop(wait=False)
    print("stopped", flush=True)
