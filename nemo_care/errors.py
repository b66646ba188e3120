"""The exceptions that end a command with an exit status of their own."""


class InputError(Exception):
    """A recipe or an input that can't be used.

    The message is one line that names the key or the file and the remedy. The command line prints
    it without a traceback and exits with status 2.
    """


class RunStopped(Exception):
    """A run that ended before its last step because it was asked to, with a checkpoint.

    The message says after which step and why. `status` is the command line's exit status: 75, by
    which a batch script knows that the same command goes on from there, or what shells have for a
    signal that a person sends.
    """

    def __init__(self, message: str, status: int = 75) -> None:
        """The end with that exit status."""
        super().__init__(message)
        self.status = status


class AlreadyDone(Exception):
    """A command whose work was done by an earlier start, so that nothing is left to do.

    The message says what is there. The command line prints it and exits with status 0.
    """


class DamagedCheckpoint(InputError):
    """A checkpoint that is not what was written: a file is missing, too short or was changed.

    The message begins with the file.
    """


class RunFailed(RuntimeError):
    """What a run can't go on from, found by its own checks; raised by all ranks alike.

    The message says what happened and what to do. The command line prints it without a traceback
    and exits with status 1.
    """


class CheckpointError(RunFailed):
    """A checkpoint that could not be written.

    The message says which step and where, what the operating system said, which older checkpoints
    are complete, and the remedy.
    """
