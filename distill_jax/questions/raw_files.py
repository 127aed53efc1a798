"""The raw files of published question sets: found in a folder or downloaded, always checked."""

import hashlib
import http.client
import os
import queue
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ANSWER_SECONDS = 5.0
"""How long a download may take to begin. One deadline for name look-up, all addresses and TLS."""


class QuestionsError(ValueError):
    """Questions that can't be read or prepared. The message says which, why and what to do."""


@dataclass(frozen=True, slots=True)
class RawFile:
    """One file as published.

    Attributes:
      name: Its file name.
      address: Where it is published.
      sha256: Of its bytes, in hex; anything else is refused.
    """

    name: str
    address: str
    sha256: str


def find_file(file: RawFile, folder: Path) -> bytes:
    """Reads a published file from a folder, or from one of the folders in it.

    Raises:
      QuestionsError: no file of that name lies there, or none has the right checksum.
    """
    check_folder(folder)
    paths = (folder / file.name, *sorted(folder.glob(f"*/{file.name}")))
    found = [path for path in paths if path.is_file()]
    if not found:
        raise QuestionsError(f"there is no {file.name} in {folder} or one folder below it.")
    contents = [path.read_bytes() for path in found]
    for content in contents:
        if _sha256(content) == file.sha256:
            return content
    return _checked(file, contents[0], where=str(found[0]))


def fetch_file(file: RawFile, *, kept: Path) -> bytes:
    """Downloads a published file, unless it was downloaded before.

    Args:
      file: Which one.
      kept: Where an earlier download may lie.

    Raises:
      QuestionsError: no network, no answer within `ANSWER_SECONDS`, or a wrong checksum.
    """
    if kept.is_file() and _sha256(content := kept.read_bytes()) == file.sha256:
        return content
    try:
        content = _download(file.address)
    except (OSError, http.client.HTTPException) as error:
        raise QuestionsError(f"can't download {file.address}: {error}.") from error
    return _checked(file, content, where=file.address)


def check_folder(folder: Path) -> None:
    """Raises `QuestionsError` where there is no such folder."""
    if not folder.is_dir():
        raise QuestionsError(f"the folder with the raw files does not exist: {folder}.")


def write_file(path: Path, content: bytes) -> None:
    """Writes beside and renames, so that a file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    beside.write_bytes(content)
    beside.replace(path)


def _checked(file: RawFile, content: bytes, *, where: str) -> bytes:
    found = _sha256(content)
    if found != file.sha256:
        raise QuestionsError(
            f"{where} is not the published {file.name}: "
            f"sha256 {file.sha256} expected, {found} found."
        )
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _download(address: str) -> bytes:
    """The bytes at an address; OSError or HTTPException if they can't be had.

    The timeout of a socket counts for each address of a host and not for the name look-up, so the
    connection is opened in a thread that may be left behind.
    """
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def open_address() -> None:
        try:
            answers.put(urllib.request.urlopen(address, timeout=ANSWER_SECONDS))
        except urllib.error.HTTPError as error:
            error.close()  # it is also the open answer
            answers.put(error)
        except (OSError, http.client.HTTPException) as error:
            answers.put(error)

    threading.Thread(target=open_address, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS:g} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    with answer:
        return answer.read()
