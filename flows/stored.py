"""Finds what a person names: a release, a variant of it, or a digest, in the store."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from modelmint.artifact import StepRecord
from modelmint.errors import CorruptError, InputError
from modelmint.release import ReleaseReport
from modelmint.spelling import did_you_mean
from modelmint.store import Store

REPORT, PAGE, LOCK = "report.json", "report.html", "lock.json"
LATEST = "latest"
_SHORTEST_DIGEST = 6


def release_folder(store: Store, name: str) -> Path:
    """Where the documents of a release lie."""
    return store.root / "releases" / name


def release_names(store: Store) -> list[str]:
    """Every release with a report, the latest first."""
    reports = list((store.root / "releases").glob(f"*/{REPORT}"))
    return [path.parent.name for path in sorted(reports, key=lambda path: path.stat().st_mtime_ns, reverse=True)]


def find_release(store: Store, name: str = "") -> str:
    """The full name of a release.

    Args:
        store: where it lies.
        name: its name or the beginning of it, which may be the recipe's name; then the latest of them is meant. Empty
            or ``latest`` for the latest of all.

    Raises:
        InputError: if there is none.
    """
    names = release_names(store)
    if not names:
        raise InputError(f"{store.root} holds no release; make one with: modelmint release RECIPE")
    if name in ("", LATEST):
        return names[0]
    found = name if name in names else next((known for known in names if known.startswith(name)), None)
    if found is None:
        raise InputError(f"{store.root} holds no release {name!r}{did_you_mean(name, names)}")
    return found


def read_report(store: Store, name: str = "") -> ReleaseReport:
    """The report of a release; `name` as for `find_release`.

    Raises:
        InputError: if there is no such release.
        CorruptError: if its report cannot be read.
    """
    path = release_folder(store, find_release(store, name)) / REPORT
    try:
        return ReleaseReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        mistake = error.errors()[0]
        where = ".".join(str(part) for part in mistake["loc"])
        raise CorruptError(
            f"{path} is no report that this version of modelmint reads: {where}: {mistake['msg']}"
        ) from None


def find_digest(store: Store, text: str, release: str = "") -> str:
    """The digest of an artifact that a person names.

    Args:
        store: where it lies.
        text: a digest, the beginning of one, or the name of a variant.
        release: the release whose variant is meant; the latest if empty.

    Raises:
        InputError: if nothing is called so, or several things are.
    """
    digits = text.removeprefix("sha256:")
    if set(digits) <= set("0123456789abcdef") and len(digits) >= _SHORTEST_DIGEST:
        found = [digest for digest in store.artifacts() if digest.startswith("sha256:" + digits)]
        if len(found) > 1:
            raise InputError(f"{text!r} is the beginning of {len(found)} digests; give more digits")
        if not found:
            raise InputError(f"{store.root} has no artifact {text!r}; modelmint store ls lists what there is")
        return found[0]
    report = read_report(store, release)
    made = {variant.variant: variant.digest for variant in report.variants if variant.digest}
    if text not in made:
        raise InputError(f"release {report.release} has made no variant {text!r}{did_you_mean(text, made)}")
    return made[text]


@dataclass(frozen=True)
class Lineage:
    """How an artifact came to be.

    Attributes:
        format: its format.
        name: as a variant is named.
        digest: the artifact.
        base: digest of the base it was made from; its own for a base.
        source: digest of the checkpoint.
    """

    format: str
    name: str
    digest: str
    base: str
    source: str


def lineage(store: Store, digest: str, name: str = "") -> Lineage:
    """How a variant or base of the store came to be, from the records of its steps.

    Args:
        store: where it lies.
        digest: the artifact.
        name: what it is called; made from its format and type if empty.

    Raises:
        InputError: if it is neither, or its records are gone.
    """
    makers: dict[str, StepRecord] = {record.output: record for record in store.records()}
    made = makers.get(digest)
    base = digest if made is None or made.step.stage == "convert" else made.step.inputs.get("base", "")
    converted = makers.get(base)
    if made is None or converted is None or converted.step.stage != "convert":
        raise InputError(
            f"{digest} is no variant whose steps are in {store.root}; modelmint store ls lists what there is"
        )
    format_name = str(made.step.parameters["format"])
    kind = made.step.parameters.get("type", "base")
    return Lineage(format_name, name or f"{format_name}:{kind}", digest, base, converted.step.inputs["source"])
