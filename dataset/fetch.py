"""Tar shards read from front to back, from a disk, over HTTP, or from the output of a command."""

import os
import re
import subprocess
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

from diffbir.dataset.sources.shards import MEMBERS, split_name
from diffbir.utils.cli import UserError
from diffbir.utils.image import SUFFIXES

ALLOW_PIPES = "DIFFBIR_ALLOW_PIPES"  # in the environment, from which loader processes have it too
TIMEOUT = 60  # seconds without any data


class Readable(Protocol):
    def read(self, size: int) -> bytes: ...


def is_command(url: str) -> bool:
    return url.startswith("pipe:")


def is_remote(url: str) -> bool:
    """Whether a shard comes from elsewhere, so that another try may help."""
    return is_command(url) or "://" in url


def check_url(url: str) -> None:
    """Refuses what must not or cannot be read; a configuration is data, and a command in it is not.

    Raises:
        UserError: a command without leave, or an unknown scheme.
    """
    if is_command(url):
        if os.environ.get(ALLOW_PIPES) != "1":
            raise UserError(f"'{url}' runs a shell command; give --allow-pipes if you know what it does")
    elif is_remote(url) and not re.match("https?://", url):
        raise UserError(f"'{url}' cannot be fetched; give http:// or https://, or a command (pipe:) that writes it")


def is_final(error: Exception) -> bool:
    """Whether a server's answer will be the same the next time, such as 404."""
    return isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code not in (408, 425, 429)


@contextmanager
def open_shard(url: str) -> Iterator[Readable]:
    """A shard's bytes; reading past their end raises an error if they are not all.

    Raises:
        UserError: see `check_url`.
    """
    check_url(url)
    if is_command(url):
        with subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE) as process:
            try:
                yield Output(process)
            finally:
                process.kill()  # the reader may have stopped before its end
    elif is_remote(url):
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            yield Response(response)
    else:
        with open(os.path.expanduser(url), "rb") as file:
            yield file


class Output:
    """What a command writes; its failure is an error at the end."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def read(self, size: int) -> bytes:
        data = self.process.stdout.read(size)
        if not data and self.process.wait():
            raise OSError(f"the command ended with status {self.process.returncode}")
        return data


class Response:
    """What a server sends; less than it announced is an error at the end."""

    def __init__(self, response: Any):
        self.response = response

    def read(self, size: int) -> bytes:
        data = self.response.read(size)
        if not data and self.response.length:
            raise OSError(f"the connection ended {self.response.length} bytes too early")
        return data


def read_samples(file: Readable | BinaryIO) -> Iterator[dict[str, Any]]:
    """Samples of a shard with an image, undecoded, in their order: `key`, and `image`, `txt`, `json` (bytes or None).

    Members whose names agree up to the first dot are one sample, as in `dataset.sources.shards`.

    Raises:
        tarfile.TarError, OSError, EOFError: the shard cannot be read to its end.
    """
    sample: dict[str, Any] = {}
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            key, suffix = split_name(member.name)
            tar.members.clear()  # tarfile keeps every header that it has seen
            if not member.isfile() or key is None:
                continue
            if sample.get("key") != key:
                if sample.get("image") is not None:
                    yield sample
                sample = {"key": key, **dict.fromkeys(MEMBERS)}
            kind = "image" if f".{suffix}" in SUFFIXES else suffix
            if kind in MEMBERS:
                sample[kind] = tar.extractfile(member).read()
    if sample.get("image") is not None:
        yield sample
    while file.read(2**20):  # what comes after the archive's end mark, so that the end of all is seen
        pass
