"""Bytes kept on disk between starts: written whole, and believed only when their digest agrees."""

import hashlib
import logging
import os
import uuid
from collections.abc import Callable


def cached(path: str | os.PathLike, build: Callable[[], bytes]) -> bytes:
    """The bytes kept at `path`; or, where none are or they are damaged, `build()`, now kept.

    The file is a SHA-256 in hex, a line feed, and the bytes. It is written beside its place and
    renamed into it, so that a reader never meets half of one and two writers do no harm. A cache
    that cannot be written is only slower: that is logged, and never stops a run.
    """
    from etils import epath

    place = epath.Path(path)
    try:
        stated, _, content = place.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() == stated:
            return content
    except OSError:
        pass  # not there yet
    content = build()
    try:
        write_whole(place, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    except OSError as error:
        logging.getLogger(__name__).warning("not cached at %s: %s", place, error)
    return content


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file that is there entirely or not at all, however the writer ends."""
    from etils import epath

    place = epath.Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        partial.write_bytes(content)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)
