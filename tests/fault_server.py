"""A teacher that misbehaves on command: an HTTP server in this process, with a log of its own."""

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Call:
    """A request as the server saw it."""

    prompt: str
    n: int
    number: int  # among all requests, from 0
    again: int  # how often this prompt came before
    body: Mapping[str, Any]
    at: float
    key: str = ""  # that came with it


@dataclass(frozen=True)
class Says:
    """What the server does with a request."""

    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drip_s: float = 0.0  # between two bytes of the body
    reset_after: int | None = None  # bytes of the body before the connection is reset


Behaviour = Callable[[Call], Says]


def chat(call: Call, *, num_choices: int | None = None, **changes: Any) -> str:
    """A proper answer, with some of its parts changed; None removes a part."""
    count = call.n if num_choices is None else num_choices
    body = {
        "id": "x",
        "object": "chat.completion",
        "model": call.body["model"],
        "choices": [choice(f"answer {k} to {call.prompt}", index=k) for k in range(count)],
        "usage": {"prompt_tokens": 50, "completion_tokens": 10 * count, "total_tokens": 0},
    }
    return json.dumps({k: v for k, v in (body | changes).items() if v is not None})


def choice(content: str | None, *, index: int = 0, finish_reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {"index": index, "message": message, "finish_reason": finish_reason}


def good(call: Call) -> Says:
    return Says(body=chat(call))


def error(status: int, code: str = "", message: str = "no", **headers: str) -> Says:
    body = {"error": {"message": message, "type": "", "code": code}}
    return Says(status, json.dumps(body), {k.replace("_", "-"): v for k, v in headers.items()})


def first_then_good(*says: Says) -> Behaviour:
    """Says these to the first requests of each prompt, then answers."""
    return lambda call: says[call.again] if call.again < len(says) else good(call)


class FaultServer:
    """The server's side of a test: what came in, and what was answered in full."""

    def __init__(self, behave: Behaviour):
        self.behave = behave
        self.calls: list[Call] = []
        self.most_at_once = 0
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()
        self._now = 0

    @property
    def prompts(self) -> list[str]:
        return [call.prompt for call in self.calls]

    def enter(self, body: Mapping[str, Any], key: str) -> Call:
        prompt = body["messages"][-1]["content"]
        with self._lock:
            again = self._seen[prompt]
            number, now = len(self.calls), time.monotonic()
            call = Call(prompt, body.get("n", 1), number, again, body, now, key)
            self.calls.append(call)
            self._seen[prompt] += 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        return call

    def leave(self) -> None:
        with self._lock:
            self._now -= 1


@contextmanager
def fault_server(behave: Behaviour) -> Iterator[tuple[FaultServer, str]]:
    """Runs a server in the background; gives it and its base URL."""
    state = FaultServer(behave)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            is_chat = self.path.endswith("/chat/completions")
            body = json.loads(raw) if is_chat else {"messages": [{"content": ""}]}
            call = state.enter(body, self.headers["Authorization"].removeprefix("Bearer "))
            try:
                _answer(self, state.behave(call))
            except ConnectionError:
                self.close_connection = True  # the client went away, which is its right
            finally:
                state.leave()

        def do_GET(self) -> None:
            _answer(self, error(404))  # it has no Batch API

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 256

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a killed client resets its connections

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(handler: BaseHTTPRequestHandler, says: Says) -> None:
    time.sleep(says.delay_s)
    raw = says.body.encode()
    handler.send_response_only(says.status)  # without a date of its own
    for name, value in says.headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(raw)))
    handler.end_headers()
    if says.drip_s:
        for byte in raw:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(says.drip_s)
    elif says.reset_after is None:
        handler.wfile.write(raw)
    else:
        handler.wfile.write(raw[: says.reset_after])
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True
