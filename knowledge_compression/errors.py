"""The errors that a user can cause and correct."""


class BadInput(ValueError):
    """The request cannot be carried out; the message is one line that says why and what would be accepted.

    The command line prints only the message and exits with status 2. Callers of the library catch this class.

    Args:
        message: may quote what the user gave: characters that end a line or do not print are shown escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class ModelUnavailable(BadInput):
    """A model that is neither cached nor available from its source."""


class DataUnavailable(BadInput):
    """Data that is not where the user said it is and not available elsewhere."""


def first_line(error: BaseException, longest: int = 240) -> str:
    """The first informative line of a library's error message, truncated if it is long."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
