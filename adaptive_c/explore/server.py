"""The server of the page: on 127.0.0.1 only, for its own pages only, until Ctrl-C."""

import asyncio
import logging
import signal
import webbrowser
from socket import create_server
from typing import Any

from bokeh.application import Application
from bokeh.application.handlers.function import FunctionHandler
from bokeh.document import Document
from bokeh.server.server import BaseServer
from bokeh.server.tornado import BokehTornado
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.web import ErrorHandler

from .page import show

ADDRESS = "127.0.0.1"
PAUSE = 5  # milliseconds, in which the changes that have come during the last drawing are read


class LocalTornado(BokehTornado):
    """Bokeh's server, which answers nothing that another site may have sent or may get to read.

    Another site's page can send requests to this address, and by a name of its own that leads here it could even read
    the answers.  The first is told by the Origin and by what browsers say of a request, the second by the Host.
    """

    def __init__(self, applications: dict[str, Application], port: int) -> None:
        self.hosts = [f"{name}:{port}" for name in (ADDRESS, "localhost")]
        super().__init__(applications, extra_websocket_origins=self.hosts)

    def find_handler(self, request: HTTPServerRequest, **more: Any) -> Any:
        if self._is_foreign(request):
            return self.get_handler_delegate(request, ErrorHandler, {"status_code": 403})
        return super().find_handler(request, **more)

    def _is_foreign(self, request: HTTPServerRequest) -> bool:
        headers = request.headers
        if headers.get("Host") not in self.hosts:
            return True
        if "Origin" in headers and headers["Origin"] not in [f"http://{host}" for host in self.hosts]:
            return True
        # A link in another site's page may be followed, but nothing of this one may be built into it.
        cross = headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        return cross and headers.get("Sec-Fetch-Dest") != "document"


def _application() -> Application:
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
