"""The lock of a release: all that is needed to make the same bytes again, and to know that they are the same.

Laws, tested under the same words:

* a lock read back from its text is equal to what was written;
* the lock of equal work is the same text: no name, no time, no order of arrival is in it.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from modelmint.artifact import Artifact, Digest, FileEntry, Step, StepRecord, Tool, canonical_json
from modelmint.recipe import Recipe
from modelmint.release import DOCUMENT, VariantReport, stage_order
from modelmint.report import Value


class LockedStep(Value):
    """A step with the digest of what it made.

    Attributes:
        key: the step's key.
        step: what was asked, in full, so that a rebuild can name what differs.
        output: digest of the artifact.
    """

    key: Digest
    step: Step
    output: Digest

    @model_validator(mode="after")
    def _key_fits(self) -> Self:
        if self.key != self.step.key:
            raise ValueError(f"the locked key {self.key} is not the key of its step, {self.step.key}")
        return self


class ReleaseLock(Value):
    """All that is needed to make the same bytes again, and to know that they are the same.

    Attributes:
        schema_version: version of this document's layout.
        recipe: what was wanted, in full.
        source: the pinned text form of the checkpoint.
        files: the checkpoint's files with their digests.
        data: digests of evaluation and calibration texts by role.
        tools: every tool that took part, each once.
        steps: in the order of their stages.
        variants: digest of each variant that was made, by name.
        bases: digest of each unquantized base, by name.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    recipe: Recipe
    source: str
    files: tuple[FileEntry, ...]
    data: dict[str, Digest] = Field(default_factory=dict)
    tools: tuple[Tool, ...] = ()
    steps: tuple[LockedStep, ...]
    variants: dict[str, Digest]
    bases: dict[str, Digest] = Field(default_factory=dict)

    model_config = DOCUMENT

    def to_json(self) -> bytes:
        """The text that is stored: equal work, equal bytes."""
        return canonical_json(self.model_dump(mode="json"))


def build_lock(
    *,
    recipe: Recipe,
    source: str,
    snapshot: Artifact,
    records: Iterable[StepRecord],
    variants: Sequence[VariantReport],
    data: dict[str, str] | None = None,
) -> ReleaseLock:
    """The lock of a release.

    Args:
        recipe: what was wanted.
        source: the pinned text form of the checkpoint.
        snapshot: the checkpoint's files.
        records: of every step of the release, in any order; the same record may come twice.
        variants: the report's variants and bases; those that were not made are left out.
        data: digests of evaluation and calibration texts by role.
    """
    by_key = {record.key: record for record in records}
    ordered = sorted(by_key.values(), key=lambda record: (stage_order(record.step.stage), record.key))
    tools = {canonical_json(tool.model_dump(mode="json")): tool for record in ordered for tool in record.step.tools}
    return ReleaseLock(
        recipe=recipe,
        source=source,
        files=snapshot.files,
        data=data or {},
        tools=tuple(tools[text] for text in sorted(tools)),
        steps=tuple(LockedStep(key=record.key, step=record.step, output=record.output) for record in ordered),
        variants={variant.variant: variant.digest for variant in variants if variant.digest and not variant.is_base},
        bases={variant.variant: variant.digest for variant in variants if variant.digest and variant.is_base},
    )
