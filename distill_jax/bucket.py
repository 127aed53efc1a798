"""Folders in buckets: their names and working folders here, and the objects below one.

A run whose folder is `gs://BUCKET/NAME` or `s3://BUCKET/NAME` is worked on in a working folder of
this machine; which one follows from the name alone, so that every process finds it.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_jax.config import ConfigError
from distill_jax.endings import DISK


@dataclass(frozen=True)
class _Kind:
    package: str  # through which fsspec reaches it
    errors: tuple[str, ...]  # what goes wrong there, besides OSError
    sign_in: str


_KINDS = {
    "gs": _Kind(
        "gcsfs",
        ("gcsfs.retry:HttpError", "google.auth.exceptions:GoogleAuthError", "aiohttp:ClientError"),
        "`gcloud auth application-default login`, or a service account of this machine",
    ),
    "s3": _Kind(
        "s3fs",
        ("botocore.exceptions:BotoCoreError", "aiohttp:ClientError"),
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role of this machine",
    ),
}


_SMALL = 5 << 20  # bytes; what is smaller gcsfs sends in a frame of its own


class BucketError(RuntimeError):
    """A bucket can't be read or written. What has not reached it is in the working folder."""

    exit_code = DISK


def _home() -> Path:
    return Path.home() / ".cache" / "distill_jax" / "runs"


def local_folder(folder: str) -> Path:
    """Where this machine works on a run: in its folder, or in the working folder of a bucket's.

    Args:
      folder: As in a config: a folder of this machine, `gs://BUCKET/NAME` or `s3://BUCKET/NAME`.

    Raises:
      ConfigError: it is neither.

    Example:
      >>> local_folder("runs/a"), local_folder("gs://lab/runs/a").relative_to(Path.home())
      (PosixPath('runs/a'), PosixPath('.cache/distill_jax/runs/gs/lab/runs/a'))
    """
    scheme, mark, place = folder.partition("://")
    if not mark:
        return Path(folder)
    parts = place.rstrip("/").split("/")
    if scheme not in _KINDS or len(parts) < 2 or {"", ".", ".."} & set(parts):
        raise ConfigError(
            "a run folder lies on this machine, or in a bucket as gs://BUCKET/NAME or "
            f"s3://BUCKET/NAME; got {folder!r}."
        )
    return _home().joinpath(scheme, *parts)


def bucket_url(path: Path) -> str:
    """The place in a bucket that something in a working folder is a copy of; else nothing.

    Example:
      >>> bucket_url(local_folder("s3://lab/a") / "round_01"), bucket_url(Path("runs/a"))
      ('s3://lab/a/round_01', '')
    """
    if not path.is_relative_to(_home()):
        return ""
    scheme, *parts = path.relative_to(_home()).parts
    return f"{scheme}://{'/'.join(parts)}" if scheme in _KINDS else ""


def aside_folder(folder: Path, name: str) -> Path:
    """Where a working folder is kept that is one no more; no bucket's place belongs to it."""
    return _home() / "set_aside" / folder.relative_to(_home()) / name


class Bucket:
    """The objects below a place in a bucket.

    Args:
      url: The place, as `bucket_url` says it.

    Raises:
      ConfigError: the package that reaches it is not installed.
    """

    def __init__(self, url: str):
        scheme, _, self._root = url.partition("://")
        self.url, self._kind = url, _KINDS[scheme]
        try:
            errors = [_find(name) for name in self._kind.errors]
            fsspec: Any = importlib.import_module("fsspec")
            self._files = fsspec.filesystem(
                scheme, use_listings_cache=False, skip_instance_cache=True
            )
        except ImportError as error:
            raise ConfigError(
                f"{url} needs the package {self._kind.package} ({error}): "
                "pip install 'distill_jax[bucket]'."
            ) from None
        self._errors = (OSError, ValueError, *errors)

    def tags(self) -> dict[str, str]:
        """What is there: names relative to the place, each with a tag that no other content has.

        Raises:
          BucketError: it can't be read; as all methods do.
        """
        with self._explained("read"):
            found = self._files.find(self._root, detail=True)
        above = f"{self._root}/"
        return {
            name.removeprefix(above): str(facts.get("generation") or facts.get("ETag"))
            for name, facts in found.items()
            if name.startswith(above) and facts["type"] == "file" and not name.endswith("/")
        }

    def read(self, name: str) -> bytes | None:
        """A small object; None if there is none."""
        with self._explained("read"):
            try:
                return self._files.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a small object, whatever was there."""
        with self._explained("written"):
            self._files.pipe_file(f"{self._root}/{name}", content)

    def get(self, name: str, path: Path) -> bool:
        """Writes an object into a file, beside it first; False if there is no such object."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.new")
        with self._explained("read"):
            try:
                self._files.get_file(f"{self._root}/{name}", str(beside))
            except FileNotFoundError:
                return False
        beside.replace(path)
        return True

    def put(self, path: Path, name: str) -> None:
        """Writes a file, which must not change meanwhile, into an object."""
        place = f"{self._root}/{name}"
        with self._explained("written"):
            if _breaks_frame(path):
                with self._files.open(place, "wb") as file:
                    file.write(path.read_bytes())
            else:
                self._files.put_file(str(path), place)

    def delete(self, name: str) -> None:
        """Deletes an object, if it is there."""
        with self._explained("written"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            said = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, FileNotFoundError):
                said = f"there is no such bucket ({said})"
            raise BucketError(
                f"{self.url} can't be {done}: {said.rstrip('.')}. Look at the name and the rights; "
                f"who asks is known from {self._kind.sign_in}."
            ) from error


def _breaks_frame(path: Path) -> bool:
    """Whether gcsfs would send the file in a frame whose end servers may see too early."""
    if path.stat().st_size >= _SMALL:
        return False
    content = path.read_bytes()
    return content.endswith(b"\r") or b"--==0==" in content


def _find(name: str) -> type[Exception]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
