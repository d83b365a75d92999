"""What goes wrong, for people: one sentence with the cause and the cure, and an exit code."""

import enum


class ExitCode(enum.IntEnum):
    """What every command leaves a shell with; docs/running.md says what to do about each."""

    DONE = 0
    FAILED = 1
    """A check failed, training diverged, or there was an error that nobody foresaw."""
    USER_ERROR = 2
    """Something the user can mend, said in one sentence; nothing is half-written."""
    DOES_NOT_FIT = 3
    """`plan`: the step does not fit the card."""
    SAVED = 75
    """Saved after Ctrl-C or SIGTERM: the same command goes on."""
    WATCHDOG = 124
    """A process of the run is gone, or nothing went on for too long: the same command goes on."""
    INTERRUPTED = 130
    """Ended by Ctrl-C where there is nothing to save."""


class UserError(Exception):
    """Something the user can mend: one sentence with the cause and the cure, exit code 2."""


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def first_line(error: BaseException) -> str:
    """What an error of a library says, for a sentence of ours; its class where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]
