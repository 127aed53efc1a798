"""How fast the teacher is asked, and how a large ledger opens: measured, not promised.

    python scripts/bench_teacher.py                 # about six minutes
    python scripts/bench_teacher.py --requests 500 --rows 20000 --json

Three measurements: requests under a limit per minute, as a share of that limit; the same without a
limit; a ledger of many answered requests, opened, looked up and gone through as a resumed run does.
The server is a process of its own on this machine and answers after a fixed latency.
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from distill_jax.config import TeacherConfig
from distill_jax.teacher.account import Account, Ask
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.ledger import Ledger

PROMPT = "Question: {0} has 5 eggs and finds 3 more every day for a week. How many?\nReasoning:" * 4
TEXT = "First, 5 eggs. Then, 3 * 7 = 21 eggs. So there are 5 + 21 = 26 eggs.\nAnswer: 26"
SAMPLES = 2


def body(number: int) -> str:
    """An answer as a server sends it."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": f"{TEXT} {number} {index}"},
            "finish_reason": "stop",
        }
        for index in range(SAMPLES)
    ]
    usage = {"prompt_tokens": 90, "completion_tokens": 60, "total_tokens": 150}
    return json.dumps({"id": "x", "model": "m", "choices": choices, "usage": usage})


class Answers(asyncio.Protocol):
    """HTTP/1.1 as far as one client needs it."""

    latency_s = 0.05

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._buffer, self._number = transport, b"", 0

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, rest = self._buffer.split(b"\r\n\r\n", 1)
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            if len(rest) < length:
                return
            self._buffer = rest[length:]
            asyncio.get_running_loop().call_later(self.latency_s, self._answer)

    def _answer(self) -> None:
        self._number += 1
        content = body(self._number).encode()
        head = (
            f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        )
        assert isinstance(self._transport, asyncio.WriteTransport)
        self._transport.write(f"{head}\r\n\r\n".encode() + content)


def serve(latency_s: float, port: Connection) -> None:
    """Serves until the process is ended."""

    async def forever() -> None:
        Answers.latency_s = latency_s
        server = await asyncio.get_running_loop().create_server(Answers, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


def ask_many(
    folder: Path, url: str, *, requests: int, per_minute: int, concurrency: int
) -> dict[str, float]:
    """Asks so many prompts and says how fast, at what cost for this machine."""
    config = TeacherConfig(
        url=url, model="m", samples=SAMPLES, concurrency=concurrency, per_minute=(per_minute, 0)
    )
    asks = [Ask(PROMPT.format(number), tuple(range(SAMPLES))) for number in range(requests)]
    with Ledger(folder / f"{per_minute}.sqlite") as ledger:
        client = TeacherClient(config, ledger, url=url, free=True)
        begun, cpu = time.monotonic(), time.process_time()
        rows = client.complete(asks)
        seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
    assert all(completion.finish_reason == "stop" for row in rows for completion in row)
    measured = {
        "requests": requests,
        "concurrency": concurrency,
        "seconds": round(seconds, 2),
        "requests_per_minute": round(60 * requests / seconds, 1),
        "cpu_ms_per_request": round(1000 * cpu / requests, 3),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }
    if per_minute:
        measured["allowed_per_minute"] = per_minute
        measured["share_of_allowed"] = round(60 * requests / seconds / per_minute, 4)
    return measured


def fill(path: Path, account: Account, asks: Sequence[Ask]) -> float:
    """Writes an answer to each ask into a new ledger; returns the seconds it took."""
    begun = time.monotonic()
    with Ledger(path) as ledger:
        for start in range(0, len(asks), 10_000):
            with ledger.together():
                for number, ask in enumerate(asks[start : start + 10_000], start):
                    request = account.request(ask)
                    intent = account.reserve(ledger, request, ask.slots)
                    assert intent is not None
                    ledger.store(intent, body(number), attempts=1, latency_s=0.05)
                    usage = {"prompt_tokens": 90, "completion_tokens": 60}
                    ledger.settle(
                        intent, usd=0.0, served_model="m", usage=usage, finish_reasons=["stop"] * 2
                    )
    return time.monotonic() - begun


def open_large(folder: Path, *, rows: int, lookups: int = 10_000) -> dict[str, float]:
    """Fills a ledger and opens it, looks answers up, and resumes a run that has them all."""
    path, config = folder / "large.sqlite", TeacherConfig(samples=SAMPLES)
    asks = [Ask(PROMPT.format(number), tuple(range(SAMPLES))) for number in range(rows)]
    with Ledger(folder / "empty.sqlite") as ledger:
        account = Account(config, ledger, url="http://127.0.0.1", free=True)
    filled_s = fill(path, account, asks)
    begun = time.monotonic()
    with Ledger(path) as ledger:
        assert ledger.spent_usd == 0.0
        opened_s = time.monotonic() - begun
        requests = [account.request(ask) for ask in Random(0).choices(asks, k=lookups)]
        begun = time.monotonic()
        assert all(len(account.answers(ledger, request)) == SAMPLES for request in requests)
        lookup_s = (time.monotonic() - begun) / lookups
        client = TeacherClient(config, ledger, url="http://127.0.0.1", free=True)
        begun = time.monotonic()
        client.complete(asks)
        resumed_s = time.monotonic() - begun
    return {
        "rows": rows,
        "file_mib": round(path.stat().st_size / 2**20, 1),
        "fill_seconds": round(filled_s, 2),
        "open_ms": round(1000 * opened_s, 2),
        "lookup_us": round(1e6 * lookup_s, 1),
        "resume_seconds": round(resumed_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast the teacher is asked.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--per-minute", type=int, default=3000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(arguments.latency, theirs), daemon=True
    )
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}/v1"
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for title, per_minute in (("limited", arguments.per_minute), ("unlimited", 0)):
            results[title] = ask_many(
                Path(name),
                url,
                requests=arguments.requests,
                per_minute=per_minute,
                concurrency=arguments.concurrency,
            )
            print(title, results[title], file=sys.stderr)
        server.terminate()
        if arguments.rows:
            results["ledger"] = open_large(Path(name), rows=arguments.rows)
    if arguments.json:
        print(json.dumps(results))
        return
    for title, measured in results.items():
        print(f"{title}: " + ", ".join(f"{name} {value:,}" for name, value in measured.items()))


if __name__ == "__main__":
    main()
