"""What `treesurgeon.models` raises. Every message names what, where, what was expected, and the fix."""


class ModelError(Exception):
    """Base of the errors of `treesurgeon.models`."""


class UnknownModelError(ModelError, LookupError):
    """A model name or a `package.module:factory` that leads nowhere."""


class ModelSpecError(ModelError, ValueError):
    """A model that was found but could not be built."""


class CheckpointError(ModelError, ValueError):
    """A checkpoint that is absent, unreadable, or of another architecture."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of others says, cut short; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]
