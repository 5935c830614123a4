"""Every error ModelMint raises on purpose.

::

    ModelMintError
    ├── InputError                 exit 1: what the user gave cannot be used
    │   ├── RecipeError            a recipe, its keys or its values
    │   ├── SourceError            a model or data source that is missing, gated, moved or damaged
    │   ├── UnsafeSourceError      foreign bytes that must not be opened
    │   └── UnsupportedError       a sound input that a format or a tool cannot take
    ├── StageError                 exit 4: a step could not be completed
    │   ├── ToolError              a tool crashed, hung or produced no valid output
    │   ├── ResourceError          disk, memory or time ran out
    │   ├── NetworkError           a remote end failed for now; worth another try
    │   └── NonDeterminismError    one step key, two different outputs
    └── ProofError                 exit 5: stored bytes or a record are not what they claim
        └── CorruptError           a stored file whose bytes no longer match its digest

A message says what is wrong, which value, and the way out.
"""


class ModelMintError(Exception):
    """Base of every error meant for a person; `exit_code` is what the command line returns for it."""

    exit_code = 4


class InputError(ModelMintError):
    """Something that the user gave cannot be used."""

    exit_code = 1


class RecipeError(InputError):
    """A recipe, one of its keys or one of its values is wrong."""


class SourceError(InputError):
    """A model or data source is missing, gated, moved or damaged."""


class UnsafeSourceError(SourceError):
    """Foreign bytes that must not be opened: pickles, lying headers, paths that leave their folder."""


class UnsupportedError(InputError):
    """A sound input that a format, a tool or this machine cannot take."""


class StageError(ModelMintError):
    """A step could not be completed."""


class ToolError(StageError):
    """A tool crashed, hung or produced no valid output.

    Args:
        message: what failed and the way out.
        signal: the name of the signal that ended the process, such as ``SIGABRT``; empty if none did.
        exit_code_of_tool: the exit status of the process where it exited by itself.
        stderr_tail: the last lines that the tool wrote to its standard error.
    """

    def __init__(
        self, message: str, *, signal: str = "", exit_code_of_tool: int | None = None, stderr_tail: str = ""
    ) -> None:
        super().__init__(message)
        self.signal = signal
        self.exit_code_of_tool = exit_code_of_tool
        self.stderr_tail = stderr_tail


class ResourceError(StageError):
    """Disk, memory or time ran out, or would."""


class NetworkError(StageError):
    """A remote end failed for now; the same call may succeed later."""


class NonDeterminismError(StageError):
    """One step key gave two different outputs; the first is kept, the second is only reported."""


class ProofError(ModelMintError):
    """Stored bytes or a record are not what they claim to be."""

    exit_code = 5


class CorruptError(ProofError):
    """A stored file whose bytes no longer match its digest."""
