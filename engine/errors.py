"""What the engine raises: every message says what, where, and what to do."""


class TreesurgeonError(Exception):
    """Base of all errors that treesurgeon raises on purpose."""


class PlanError(TreesurgeonError, ValueError):
    """A plan names what is not there, empties a group, or asks for more than the graph allows."""


class StructureError(TreesurgeonError, ValueError):
    """A pytree of parameters does not have the leaves or shapes that the graph expects."""


class NarrowError(TreesurgeonError, ValueError):
    """A function reads pruned parameters in a way that the traced function did not show."""


class ArtifactError(TreesurgeonError, ValueError):
    """A saved model is missing, damaged, or of a format that this version does not read."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of others says, cut short; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]
