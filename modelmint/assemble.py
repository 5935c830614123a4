"""Puts what the steps of a release left behind together: one report for each variant, one for the release, one lock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modelmint import formats
from modelmint.errors import ModelMintError
from modelmint.evaluate import read
from modelmint.inspection import Inspection
from modelmint.recipe import Recipe, Variant
from modelmint.reference import first_scored
from modelmint.release import EvaluationReport, SourceReport, StepReport, VariantReport, merged
from modelmint.release_lock import ReleaseLock, build_lock
from modelmint.report import Measurement, judge
from modelmint.step import StepResult
from modelmint.store import Store

Outcome = StepResult | ModelMintError | None
"""How a stage ended for one variant: done, failed, or not come to because an earlier one failed."""


@dataclass(frozen=True)
class Trail:
    """One variant, or the unquantized base of a format, and how each of its stages ended.

    Attributes:
        variant: what was wanted; for a base its type is that of the base.
        stages: how each stage ended, by the stage's name, in their order.
        is_base: whether it is a base.
    """

    variant: Variant
    stages: Mapping[str, Outcome]
    is_base: bool = False

    @property
    def results(self) -> dict[str, StepResult]:
        """The stages that were done."""
        return {stage: outcome for stage, outcome in self.stages.items() if isinstance(outcome, StepResult)}

    @property
    def failure(self) -> str:
        """Which stage failed first and why; empty if none did."""
        for stage, outcome in self.stages.items():
            if isinstance(outcome, ModelMintError):
                return f"{stage} failed: {outcome}"
        return ""

    @property
    def artifact(self) -> str:
        """Digest of the files that it is; empty if they were not made."""
        made = self.results.get("convert" if self.is_base else "quantize")
        return made.record.output if made else ""


@dataclass(frozen=True)
class Shared:
    """What the variants of a release have in common.

    Attributes:
        recipe: what was wanted.
        source: the pinned text form of the checkpoint.
        revision: its commit, tree digest or version.
        inspection: what was found in it.
        steps: the steps that belong to no single variant.
    """

    recipe: Recipe
    source: str
    revision: str
    inspection: Inspection
    steps: Sequence[StepResult] = field(default=())

    def step(self, stage: str) -> StepResult | None:
        """The first shared step of a stage."""
        return next((result for result in self.steps if result.record.step.stage == stage), None)


def variant_report(trail: Trail, shared: Shared, store: Store, base: Trail | None = None) -> VariantReport:
    """One variant as it was made, measured and judged.

    Args:
        trail: how its stages ended.
        shared: recipe and source.
        store: where its measurements lie.
        base: the trail of its format's base, whose distance to the source every variant bears; None for a base.
    """
    variant, results = trail.variant, trail.results
    documents = [read(store, results[s].record.output) for s in ("evaluate", "benchmark") if s in results]
    figures = [document.measurements for document in documents]
    figures.append(tuple(m for s in ("convert", "quantize") if s in results for m in _properties(trail, s)))
    files: tuple[str, ...] = ()
    size = 0
    if trail.artifact:
        artifact = store.artifact(trail.artifact)
        size = artifact.size
        figures.append((Measurement(measure="size", value=size),))
        name = formats.load(variant.format).file_name
        model = shared.recipe.source.model_name
        files = tuple(name(model, variant.type, variant.label, entry.path) for entry in artifact.files)
    if shared.recipe.evaluation.reference == "source":
        figures.append(_conversion(base or trail, store))
    measurements = merged(*figures)
    verdict = None
    if not trail.is_base:
        verdict = judge(measurements, shared.recipe.gates_of(variant), trail.failure)
    notes = [note for result in results.values() for note in result.record.notes]
    notes += [note for document in documents for note in document.notes]
    if trail.is_base and trail.failure:
        notes.append(trail.failure)
    return VariantReport(
        variant=variant.name,
        format=variant.format,
        type=variant.type,
        label=variant.label,
        required=variant.required,
        is_base=trail.is_base,
        digest=trail.artifact,
        size_bytes=size,
        files=files,
        options=variant.options,
        base=base.artifact if base is not None else "",
        measurements=measurements,
        answers=tuple(answer for document in documents for answer in document.answers),
        notes=tuple(dict.fromkeys(notes)),
        verdict=verdict,
        steps=tuple(StepReport.of(result.record, result.reused) for result in results.values()),
    )


def _properties(trail: Trail, stage: str) -> tuple[Measurement, ...]:
    """What fell out of making the files; a variant does not inherit its base's bits per weight."""
    if stage == "convert" and not trail.is_base:
        return ()
    return trail.results[stage].record.measurements


def _conversion(base: Trail, store: Store) -> tuple[Measurement, ...]:
    """What conversion lost: the divergence of the base from the source."""
    evaluated = base.results.get("evaluate")
    if evaluated is None:
        return ()
    figures = read(store, evaluated.record.output).measurements
    return tuple(m.model_copy(update={"measure": "conversion_kl"}) for m in figures if m.measure == "kl_divergence")


def source_report(shared: Shared) -> SourceReport:
    """The checkpoint everything was made from."""
    inspection, acquired = shared.inspection, shared.step("acquire")
    return SourceReport(
        reference=shared.source,
        model=shared.recipe.source.model_name,
        revision=shared.revision,
        digest=acquired.record.output if acquired else "",
        license=inspection.license,
        architecture=inspection.architecture,
        parameters=inspection.parameters,
        size_class=inspection.size_class,
        context_length=inspection.context_length,
        notice=inspection.quantized_source,
    )


def evaluation_report(shared: Shared, text: str) -> EvaluationReport:
    """What quality was measured against.

    Args:
        shared: recipe and source.
        text: digest of the evaluation text's artifact.
    """
    evaluation = shared.recipe.evaluation
    return EvaluationReport(
        reference=evaluation.reference,
        dtype=evaluation.dtype,
        data=str(evaluation.data),
        text_digest=text,
        window=evaluation.window,
        windows=evaluation.windows,
        positions=evaluation.windows * (evaluation.window - 1 - first_scored(evaluation.window)),
        exact=shared.inspection.vocabulary <= evaluation.top + evaluation.sample,
        top=evaluation.top,
        sample=evaluation.sample,
    )


def release_lock(
    trails: Sequence[Trail], variants: Sequence[VariantReport], shared: Shared, text: str, store: Store
) -> ReleaseLock:
    """All that is needed to make the same bytes again.

    Args:
        trails: of bases and variants.
        variants: their reports.
        shared: recipe and source.
        text: digest of the evaluation text's artifact.
        store: where the checkpoint's manifest lies.
    """
    acquired = shared.step("acquire")
    assert acquired is not None, "a release without a checkpoint has no lock"
    records = [result.record for result in shared.steps]
    records += [result.record for trail in trails for result in trail.results.values()]
    return build_lock(
        recipe=shared.recipe,
        source=shared.source,
        snapshot=store.artifact(acquired.record.output),
        records=records,
        variants=variants,
        data={"evaluation": text},
    )
