"""A process that reads batches for another one, which started it: see :mod:`.helpers`."""

from __future__ import annotations

import logging
import os
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch

from knowledge_compression.evaluation.scoring.handing import packed, taken_over, unpacked
from knowledge_compression.evaluation.scoring.reader import Reader
from knowledge_compression.memory import reuse_freed_memory
from knowledge_compression.models.device import Device
from knowledge_compression.stopping import end_when_closed


def help_out(connection: Connection[Any, Any], weights: int, place: torch.device, threads: int) -> None:
    """Take a reader over, then answer its requests until the other end is closed.

    Args:
        connection: to the process that asks.
        weights: descriptor of the file with the reader's tensors.
        place: the device for those that are not on the CPU.
        threads: for products on the CPU.
    """
    torch.set_num_threads(threads)
    if place.type == "cpu":
        reuse_freed_memory()
    try:
        reader, Device.known = taken_over(connection.recv_bytes(), weights, place)
        os.close(weights)
    except Exception as error:
        connection.send_bytes(packed(_sayable(error)))
        return
    connection.send_bytes(packed(None))
    named = {"tokenizer": reader.model.tokenizer}
    while True:
        try:
            asked = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answered(reader, asked, named))


def _answered(reader: Reader, asked: bytes, named: dict[str, Any]) -> bytes:
    """The results of a request, times that memory did not suffice, and tokens read; or the error that it met."""
    reader.tokens_read = reader.tokens_padded = 0
    before = len(reader.budget.fallbacks)
    try:
        parts = list(reader.read(unpacked(asked, named)))
        halvings = len(reader.budget.fallbacks) - before
        return packed((parts, halvings, reader.tokens_read, reader.tokens_padded))
    except Exception as error:
        return packed(_sayable(error))


def _sayable(error: Exception) -> Exception:
    """The error, or where it cannot be sent, one that says the same."""
    try:
        unpacked(packed(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def main() -> None:
    """Entry point; the arguments are those of :func:`help_out`, with descriptors that were inherited."""
    end_when_closed(sys.stdin.fileno())
    logging.disable(logging.WARNING)  # the process that asks says the same
    connection, weights, place, threads = sys.argv[1:]
    help_out(Connection(int(connection)), int(weights), torch.device(place), int(threads))


if __name__ == "__main__":
    main()
