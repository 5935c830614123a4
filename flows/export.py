"""Writes variants out of the store under the names that people expect."""

import tempfile
from pathlib import Path

from modelmint.errors import InputError, ResourceError
from modelmint.release import ReleaseReport, VariantReport
from modelmint.store import Store


def export(store: Store, report: ReleaseReport, folder: Path, *, failed_as_well: bool = False) -> list[Path]:
    """Write the files of every variant that passed; each appears whole or not at all, its bytes hashed on the way.

    Args:
        store: where they lie.
        report: of the release.
        folder: where they go; made if it is missing.
        failed_as_well: whether variants that failed are written, too.

    Returns:
        The files written.

    Raises:
        InputError: if the folder cannot be written.
        CorruptError: if a stored file is damaged.
        ResourceError: if the disk is full.
    """
    wanted = [v for v in report.judged if v.digest and (v.outcome == "passed" or failed_as_well)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that a rename brings a file to its place.
        with tempfile.TemporaryDirectory(prefix=".modelmint-", dir=folder) as scratch:
            return [
                file for number, v in enumerate(wanted) for file in _one(store, v, folder, Path(scratch, str(number)))
            ]
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{folder}: cannot export there: {error.strerror}; give another folder") from error
    except OSError as error:
        raise ResourceError(f"{folder}: cannot export there: {error}") from error


def _one(store: Store, variant: VariantReport, folder: Path, scratch: Path) -> list[Path]:
    store.materialize(variant.digest, scratch)
    entries = store.artifact(variant.digest).files
    targets = []
    for entry, name in zip(entries, variant.files, strict=True):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (scratch / entry.path).replace(target)
        targets.append(target)
    return targets
