"""Taking results, as a user types it."""

from __future__ import annotations

import pytest

from knowledge_compression.take import main


def taken(*arguments: object) -> None:
    main([str(word) for word in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which something is refused; nothing is written."""
    with pytest.raises(SystemExit) as end:
        taken(*arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said
