"""Buckets on this machine: servers that speak Google's and Amazon's protocols."""

import importlib.util
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

PACKAGES = {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto", "flask_cors")}


@contextmanager
def bucket_server(scheme: str) -> Iterator[dict[str, str]]:
    """An empty bucket named `lab`; gives what the environment of those who use it holds."""
    for package in PACKAGES[scheme]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{scheme}:// needs {package}: pip install 'distill_jax[bucket,reference]'")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = {"gs": _google, "s3": _amazon}[scheme]
    with serve(port) as environment:
        yield environment


@contextmanager
def _google(port: int) -> Iterator[dict[str, str]]:
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    storage, lock = Storage(use_memory_fs=True), threading.Lock()
    create_bucket("lab", storage)

    class Handler(RequestHandler):
        """Its own server waits for ever for whoever connects and says nothing; so threads."""

        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            return _one_at_a_time(found, lock) if name.startswith("do_") else found

        def end_headers(self) -> None:
            """Google says which generation was read; who writes on top of it needs that."""
            read = re.search(r"/b/([^/]+)/o/([^?]+)[?].*alt=media", self.path)
            with suppress(NotFound):
                if self.command == "GET" and read is not None:
                    held = storage.get_file_obj(read[1], unquote(read[2]))
                    self.send_header("x-goog-generation", held["generation"])
            super().end_headers()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 256

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a killed client resets its connections

    server = Server(("127.0.0.1", port), partial(Handler, storage))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    address = f"http://127.0.0.1:{port}"
    try:
        yield {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_CLOUD_PROJECT": "lab",
            "NO_GCE_CHECK": "true",
        }
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _one_at_a_time(act: Callable[[], None], lock: threading.Lock) -> Callable[[], None]:
    def locked() -> None:
        with lock:
            act()

    return locked


@contextmanager
def _amazon(port: int) -> Iterator[dict[str, str]]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{port}"
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    try:
        boto3.client("s3", region_name="us-east-1", endpoint_url=address, **keys).create_bucket(
            Bucket="lab"
        )
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_DEFAULT_REGION": "us-east-1",
            **{name.upper(): value for name, value in keys.items()},
        }
    finally:
        server.stop()
