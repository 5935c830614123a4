"""Answers an unknown name with the nearest known one."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name.

    Args:
        name: what was written.
        known: every name that would have been right.

    Returns:
        ``"; did you mean 'x'?"`` where one is near, else ``"; known are ..."`` with at most 40 names, sorted.
    """
    names = sorted(known)
    folded = {candidate.casefold(): candidate for candidate in names}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {folded[near[0]]!r}?"
    shown = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
    return f"; known are {shown}"
