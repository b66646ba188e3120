"""The exceptions that determine a command's exit status, and what is shown of another one."""


class InputError(Exception):
    """Raised for a recipe or an input that can't be used.

    The message is one line that names the key or the file and the remedy. The command line prints
    it without a traceback and exits with status 2.
    """


class RunStopped(Exception):
    """Raised when a run was asked to stop before its last step and has saved a checkpoint.

    The message gives the step and the reason. `status` is the command line's exit status: 75, from
    which a batch script recognises that the same command resumes the run, or the shell's status for
    a signal that a user sends.
    """

    def __init__(self, message: str, status: int = 75) -> None:
        """Create the exception with an exit status."""
        super().__init__(message)
        self.status = status


class AlreadyDone(Exception):
    """Raised when an earlier start of the command has already done its work.

    The message names the result. The command line prints it and exits with status 0.
    """


class DamagedCheckpoint(InputError):
    """Raised when a checkpoint differs from what was written: a file is missing, short or changed.

    The message begins with the file name.
    """


class RunFailed(RuntimeError):
    """Raised on all ranks alike when a run's own checks find that it can't continue.

    The message says what happened and what to do. The command line prints it without a traceback
    and exits with status 1.
    """


class EnginesLost(RunFailed):
    """Raised when an engine that samples has died too often or does not start again.

    Training saves what it has and exits with status 75: the same command may find better machines.
    """


class CheckpointError(RunFailed):
    """Raised when a checkpoint could not be written.

    The message gives the step, the place, the operating system's error, the older checkpoints that
    are complete, and the remedy.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
