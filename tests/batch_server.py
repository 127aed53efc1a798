"""A fake Batch API: files and batches in memory, and batches that end as a test says."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fault_server import Call, chat

Row = dict[str, Any]


@dataclass(frozen=True)
class Ends:
    """How a batch ends: its status and the lines of its two result files."""

    status: str = "completed"
    output: tuple[Row, ...] = ()
    errors: tuple[Row, ...] = ()
    problem: str = ""


Behaviour = Callable[[int, list[Row]], Ends]  # the number of the batch and its lines


def answered(row: Row, **changes: Any) -> Row:
    """A line of an output file that answers a request."""
    body = row["body"]
    call = Call(body["messages"][-1]["content"], body.get("n", 1), 0, 0, body, 0.0)
    return refused(row, 200, json.loads(chat(call, **changes)))


def refused(row: Row, status: int, body: Any) -> Row:
    """A line that came with a status."""
    response = {"status_code": status, "request_id": "r", "body": body}
    return {"id": "b", "custom_id": row["custom_id"], "response": response, "error": None}


def all_good(number: int, rows: list[Row]) -> Ends:
    return Ends(output=tuple(answered(row) for row in reversed(rows)))


@dataclass
class BatchServer:
    """What came in."""

    behave: Behaviour
    polls: int  # looks at a batch before it ends
    reset_create: int = 0  # how many batches are made without an answer to whoever makes them
    key: str = ""  # the only one that is taken; any, if empty
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, Row] = field(default_factory=dict)

    @property
    def rows(self) -> list[list[Row]]:
        """The lines of each batch."""
        return [_lines(self.files[batch["input_file_id"]]) for batch in self.batches.values()]

    def make(self, wanted: Row) -> Row:
        name = f"batch_{len(self.batches)}"
        batch = {
            "id": name,
            "object": "batch",
            "created_at": 0,
            "status": "in_progress",
            "looks": 0,
            "request_counts": {"total": 1, "completed": 0, "failed": 0},
            **wanted,
        }
        self.batches[name] = batch
        return batch

    def look(self, name: str) -> Row:
        batch = self.batches[name]
        batch["looks"] += 1
        if batch["looks"] > self.polls and batch["status"] == "in_progress":
            rows = _lines(self.files[batch["input_file_id"]])
            ends = self.behave(list(self.batches).index(name), rows)
            batch["status"] = ends.status
            for kind, lines in (("output", ends.output), ("error", ends.errors)):
                if lines:
                    batch[f"{kind}_file_id"] = self.keep(
                        "\n".join(json.dumps(line) for line in lines).encode()
                    )
            if ends.problem:
                batch["errors"] = {"object": "list", "data": [{"message": ends.problem}]}
        return batch

    def keep(self, content: bytes) -> str:
        name = f"file_{len(self.files)}"
        self.files[name] = content
        return name


def _lines(content: bytes) -> list[Row]:
    return [json.loads(line) for line in content.splitlines()]


@contextmanager
def batch_server(
    behave: Behaviour, *, polls: int = 1, reset_create: int = 0
) -> Iterator[tuple[BatchServer, str]]:
    """Runs a server in the background; gives it and its base URL."""
    state = BatchServer(behave, polls, reset_create)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.endswith("/files"):
                content = re.search(rb'filename="[^"]*".*?\r\n\r\n(.*?)\r\n--', raw, re.DOTALL)
                assert content is not None
                name = state.keep(content[1])
                self._say({"id": name, "object": "file", "bytes": 1, "created_at": 0,
                           "filename": "f", "purpose": "batch", "status": "processed"})  # fmt: skip
            elif self.path.endswith("/batches"):
                batch = state.make(json.loads(raw))
                if state.reset_create:
                    state.reset_create -= 1
                    self.connection.close()
                    self.close_connection = True
                    return
                self._say(batch)

        def do_GET(self) -> None:
            *_, kind, name = self.path.split("?")[0].split("/")
            if name == "content":
                self._send(state.files[kind])
            elif name == "batches":
                data = list(state.batches.values())
                self._say({"object": "list", "data": data, "has_more": False})
            else:
                self._say(state.look(name))

        def _say(self, value: Any) -> None:
            self._send(json.dumps(value).encode())

        def _send(self, raw: bytes) -> None:
            refused = state.key and self.headers["Authorization"] != f"Bearer {state.key}"
            self.send_response(401 if refused else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
