"""How a command ends: the exit codes, and which errors a user can mend."""

import errno

WRONG_USAGE, DISK, INTERRUPTED = 2, 13, 14
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that a user can mend; None for a bug.

    Example:
      >>> exit_code(ValueError("no such task")), exit_code(KeyError("a bug"))
      (2, None)
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, OSError):
        return DISK if error.errno in _FULL else None
    return getattr(error, "exit_code", WRONG_USAGE if isinstance(error, ValueError) else None)


def sentence(error: BaseException) -> str:
    """What to tell of an error that a user can mend.

    Example:
      >>> sentence(KeyboardInterrupt())
      'interrupted; the same command goes on from here.'
    """
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted; the same command goes on from here."
    return str(error)
