"""Writing to a disk that may have no room."""

from __future__ import annotations

import errno
import os
import re
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # errors that only writing can cause
_OF_RUST = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust, such as safetensors, quote an error of the system


def no_room(error: BaseException) -> str | None:
    """Why a disk could not be written, if that is what an error is about."""
    told = _OF_RUST.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    return os.strerror(number) if number is not None and number in _FULL else None


def write_table(table: pl.DataFrame, path: Path) -> None:
    """Write a table as parquet.

    Raises:
        OSError: it cannot be written; polars itself raises an error of its own, which need not say why.
    """
    content = BytesIO()
    table.write_parquet(content)
    path.write_bytes(content.getbuffer())
