"""The HTTP server: `/health` and `/generate`."""

# ruff: noqa: G004
# It logs as SGLang does.

import json
import logging
import signal
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sglang.srt.entrypoints.engine import Scheduler, hang_if_asked
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    scheduler: Scheduler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        found = self.path == "/health"
        self._answer(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            answer = self.server.scheduler.ask(body["input_ids"], body["sampling_params"])
            self._answer(HTTPStatus.OK, answer.result())
        except ValueError as error:
            logger.error(f"[http_server] Error: {error}")
            said = {"error": {"message": str(error)}}
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, said)

    def _answer(self, status: HTTPStatus, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing: uvicorn's access log is off."""


def launch_server(server_args: ServerArgs) -> None:
    """Serve until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    hang_if_asked()
    scheduler = Scheduler(server_args)
    try:
        with _Server((server_args.host, server_args.port), _Handler) as server:
            server.scheduler = scheduler
            logger.info(
                f"Uvicorn running on http://{server_args.host}:{server_args.port} "
                "(Press CTRL+C to quit)"
            )
            logger.info("The server is fired up and ready to roll!")
            server.serve_forever()
    finally:
        scheduler.close()
