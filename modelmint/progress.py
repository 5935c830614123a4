"""How far a stage is, in words: the same in logs, on a terminal and in Prefect's UI."""

from modelmint.isolate import Progress

BEGUN = Progress(done=0, total=0, unit="", rate=None, remaining_seconds=None)
"""Said of a stage that has begun, before anything is known of it."""


def in_words(progress: Progress) -> str:
    """Percent, rate and what remains, such as ``42 %, 118 MB/s, 3 s left``."""
    parts = [f"{100 * progress.done / progress.total:.0f} %" if progress.total else f"{progress.done:.0f}"]
    if progress.rate is not None:
        size = progress.unit == "bytes"
        parts.append(f"{progress.rate / 1e6:.0f} MB/s" if size else f"{progress.rate:.3g} {progress.unit}/s")
    if progress.remaining_seconds is not None:
        parts.append(f"{progress.remaining_seconds:.0f} s left")
    return ", ".join(parts)
