"""The errors that a user can cause and correct."""


class BadInput(ValueError):
    """What the user asked for cannot be done; the message is one line that says why and what would be accepted.

    The command line prints the message alone and exits with status 2. Library callers catch this class.
    """


class ModelUnavailable(BadInput):
    """A model that is neither cached nor to be had from where it was asked for."""


class DataUnavailable(BadInput):
    """Data that is not where the user said it is, and not to be had elsewhere."""


def first_line(error: BaseException, longest: int = 240) -> str:
    """The first line of a library's error message that says something, cut where it is long."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
