"""Looks ahead: what a release of a recipe would do, what it finds done, and what it would take. Nothing is made.

The stages themselves are asked, with a store in which nothing begins: a stage whose result is there gives it, any other
one stops where its work would begin. So the keys are those of the release, and cannot drift from it.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NoReturn

from modelmint import acquire, benchmark, convert, evaluate, formats, inspect, quantize, reference, text
from modelmint.artifact import StepRecord
from modelmint.errors import ModelMintError, RecipeError, ResourceError
from modelmint.host import free_disk_bytes
from modelmint.inspection import Inspection
from modelmint.plan import Plan, PlannedStep, PlannedVariant
from modelmint.recipe import Recipe, Variant
from modelmint.release import StepCount
from modelmint.sources import PinnedRef
from modelmint.step import Context, StepResult
from modelmint.store import Store


class _WouldRun(Exception):  # noqa: N818 - not an error, an answer
    """Raised where a step's work would begin."""


class _Looking(Store):
    """A store in which no step begins."""

    @contextmanager
    def in_use(self, purpose: str) -> Iterator[NoReturn]:
        """Stop: a step takes the store in use before anything else is done for it."""
        raise _WouldRun(purpose)
        yield  # a context manager needs one


def plan_release(recipe: Recipe, context: Context) -> Plan:
    """What a release would do.

    Weights are not downloaded; of a remote source a few small requests are made.

    Raises:
        InputError: if the release would be refused before any variant, as it is there.
        NetworkError: if the source does not answer.
    """
    looking = _Look(recipe, replace(context, store=_Looking(context.store.root)))
    return looking.plan()


@dataclass
class _Look:
    """What is known so far of one release ahead."""

    recipe: Recipe
    context: Context
    keys: dict[str, bool] = field(default_factory=dict)
    ahead: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def plan(self) -> Plan:
        """Go through the stages in their order."""
        recipe, store = self.recipe, self.context.store
        pinned = acquire.resolve(recipe.source, self.context.settings)
        snapshot = self.ask("acquire", lambda: acquire.acquire(pinned, self.context))
        inspected = snapshot and self.ask("inspect", lambda: inspect.inspect(snapshot.record.output, self.context))
        if not snapshot:
            self.ahead.append(("inspect", "", ""))
        inspection = self.inspection(pinned, inspected)
        words = self.ask("text", lambda: text.acquire_text(recipe.evaluation.data, self.context))
        shared = [("acquire", snapshot), ("inspect", inspected), ("text", words)]
        rows: list[PlannedVariant] = []
        for format_name in recipe.formats():
            rows += self.format(format_name, inspection, snapshot, words, shared)
        needed = self.disk(rows, inspection, acquired=snapshot is not None)
        return Plan(
            recipe=recipe.name,
            source=str(pinned),
            model=recipe.source.model_name,
            variants=tuple(rows),
            steps=tuple(PlannedStep(stage=stage, state=_state(found)) for stage, found in shared),
            step_count=StepCount(
                executed=len(dict.fromkeys(self.ahead)), reused=sum(reused for reused in self.keys.values())
            ),
            disk_bytes=needed,
            disk_free_bytes=free_disk_bytes(store.root),
            memory_bytes=inspect.needs(inspection, _possible(recipe)).memory_bytes,
            seconds=_Past(store).seconds(self.ahead, inspection.size),
            notes=tuple(self.notes),
        )

    def ask(self, stage: str, do: Callable[[], StepResult], format_name: str = "", kind: str = "") -> StepResult | None:
        """The result of a stage if it is there; None, and the stage noted, if it would run."""
        try:
            result = do()
        except _WouldRun:
            self.ahead.append((stage, format_name, kind))
            return None
        self.keys[result.record.key] = True
        return result

    def inspection(self, pinned: PinnedRef, inspected: StepResult | None) -> Inspection:
        """What is in the checkpoint, from the store or by a look at the source, judged as the release would."""
        if inspected is not None:
            found = inspect.read_inspection(inspected, self.context.store, pinned)
        else:
            found = inspect.preview(pinned, self.context.settings, self.recipe.formats())
        try:
            inspect.refuse(found, _possible(self.recipe), self.context.settings, acquired=inspected is not None)
        except ResourceError as error:
            # The plan shows what is missing; the release would stop.
            self.notes.append(str(error))
        if found.quantized_source:
            self.notes.append(found.quantized_source)
        return found

    def format(
        self,
        name: str,
        inspection: Inspection,
        snapshot: StepResult | None,
        words: StepResult | None,
        shared: list[tuple[str, StepResult | None]],
    ) -> list[PlannedVariant]:
        """The base of a format and its variants."""
        recipe = self.recipe
        options = convert.base_options(name, recipe.base.get(name, {}), recipe.source.model_name)
        base = self.chain(
            "convert", lambda source: convert.convert(source, name, options, self.context), snapshot, name
        )
        against = self.reference(name, snapshot, words, base)
        shared += [("reference", against)] if ("reference", against) not in shared else []
        as_base = Variant(format=name, type=formats.load(name).base_type(options))
        rows = [self.variant(as_base, inspection, base, base, against, is_base=True)]
        for variant in (variant for variant in recipe.variants if variant.format == name):
            try:
                formats.load(name).check(variant)
            except RecipeError as error:
                rows.append(PlannedVariant(variant=variant.name, required=variant.required, refusal=str(error)))
                continue
            made = self.chain("quantize", partial(self.quantize, variant), base, name, variant.name)
            rows.append(self.variant(variant, inspection, base, made, against))
        return rows

    def quantize(self, variant: Variant, base: str) -> StepResult:
        """Ask the quantize stage."""
        return quantize.quantize(base, variant, self.context)

    def reference(
        self, name: str, snapshot: StepResult | None, words: StepResult | None, base: StepResult | None
    ) -> StepResult | None:
        """What variants of a format are measured against."""
        evaluation = self.recipe.evaluation
        of_base = evaluation.reference == "base"
        if snapshot is None or words is None or (of_base and base is None):
            self.ahead.append(("reference", name if of_base else "", ""))
            return None
        held = (name, base.record.output) if of_base and base is not None else None
        return self.ask(
            "reference",
            lambda: reference.reference(
                snapshot.record.output, words.record.output, evaluation, self.context, base=held
            ),
            name if of_base else "",
        )

    def chain(
        self, stage: str, do: Callable[[str], StepResult], needs: StepResult | None, *what: str
    ) -> StepResult | None:
        """Ask a stage that works on the output of another; it runs where that one does."""
        if needs is None:
            self.ahead.append((stage, *(*what, "", "")[:2]))  # type: ignore[arg-type]
            return None
        return self.ask(stage, lambda: do(needs.record.output), *what)

    def variant(
        self,
        variant: Variant,
        inspection: Inspection,
        base: StepResult | None,
        made: StepResult | None,
        against: StepResult | None,
        *,
        is_base: bool = False,
    ) -> PlannedVariant:
        """One variant or base with the steps of its own."""
        recipe, context, name = self.recipe, self.context, variant.format
        threads = recipe.benchmark.threads if recipe.benchmark else 0
        steps = [("convert" if is_base else "quantize", made)]

        def scored(digest: str) -> StepResult:
            assert against is not None, "asked for only where there is a reference"
            return evaluate.evaluate(name, digest, against.record.output, recipe.evaluation, threads, context)

        steps.append(
            ("evaluate", self.chain("evaluate", scored, made if against is not None else None, name, variant.name))
        )
        if (wanted := recipe.benchmark) is not None:

            def timed(digest: str) -> StepResult:
                assert base is not None, "a variant is made from a base"
                subject = benchmark.Subject(name, digest, base.record.output)
                found = benchmark.benchmark({variant.name: subject}, wanted, context)[variant.name]
                if isinstance(found, ModelMintError):
                    raise found
                return found

            steps.append(("benchmark", self.chain("benchmark", timed, made, name, variant.name)))
        return PlannedVariant(
            variant=variant.name,
            required=variant.required,
            is_base=is_base,
            size_bytes=self.size(variant, inspection, made),
            steps=tuple(PlannedStep(stage=stage, state=_state(found)) for stage, found in steps),
        )

    def size(self, variant: Variant, inspection: Inspection, made: StepResult | None) -> int | None:
        """Bytes of a variant: known, or predicted from the checkpoint's tensors."""
        if made is not None:
            return self.context.store.artifact(made.record.output).size
        module = formats.load(variant.format)
        # A base is named as its converter names it; the same type among the quantization types has the same size.
        kind = next((name for name in module.types() if name.casefold() == variant.type.casefold()), None)
        if kind is None:
            return None
        return module.predict_size(inspection.tensors, variant.model_copy(update={"type": kind}))

    def disk(self, rows: list[PlannedVariant], inspection: Inspection, *, acquired: bool) -> int:
        """Bytes of what would be made, and of the largest copy that a tool works on meanwhile."""
        made = sum(
            row.size_bytes or 0
            for row in rows
            if any(step.stage in ("convert", "quantize") and step.state == "runs" for step in row.steps)
        )
        stages = {stage for stage, _, _ in self.ahead}
        bases = [row.size_bytes or 0 for row in rows if row.is_base]
        copies = [inspection.size] if stages & {"convert", "reference", "inspect"} else []
        copies += bases if stages & {"quantize", "evaluate"} else []
        copies += [sum(row.size_bytes or 0 for row in rows)] if "benchmark" in stages else []
        return made + max(copies, default=0) + (0 if acquired else inspection.size)


class _Past:
    """How long steps of the same kind took before."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._records = list(store.records())
        self._makers = {record.output: record for record in self._records}

    def seconds(self, ahead: list[tuple[str, str, str]], size: int) -> float | None:
        """Seconds of the steps ahead for a checkpoint of that many bytes; None if any kind has never been done."""
        total = 0.0
        for stage, format_name, variant in dict.fromkeys(ahead):
            kind = variant.partition(":")[2].partition("@")[0]
            found = self._of(stage, format_name, kind, size)
            if not found:
                return None
            total += statistics.median(found)
        return total

    def _of(self, stage: str, format_name: str, kind: str, size: int) -> list[float]:
        """The nearest relatives: of the same type, else of the same format."""
        same = [
            record
            for record in self._records
            if record.step.stage == stage and record.step.parameters.get("format", "") in (format_name, "")
        ]
        of_type = [record for record in same if record.step.parameters.get("type") == kind]
        return [record.seconds * self._scale(record, size) for record in of_type or same]

    def _scale(self, record: StepRecord, size: int) -> float:
        """How much larger the checkpoint is than that of the record."""
        origin = self._origin(record)
        artifact = origin and self._store.artifact(origin.output)
        return size / artifact.size if artifact else 1.0

    def _origin(self, record: StepRecord) -> StepRecord | None:
        """The step that brought the checkpoint in."""
        inputs: Mapping[str, str] = record.step.inputs
        if not inputs:
            return record if "source" in record.step.parameters else None
        for role in ("source", "snapshot", "base", "variant"):
            if maker := self._makers.get(inputs.get(role, "")):
                return self._origin(maker)
        return None


def _possible(recipe: Recipe) -> Recipe:
    """The recipe without the variants that its formats refuse."""
    kept = []
    for variant in recipe.variants:
        try:
            formats.load(variant.format).check(variant)
            kept.append(variant)
        except RecipeError:
            continue
    return recipe.model_copy(update={"variants": tuple(kept)})


def _state(found: StepResult | None) -> Literal["runs", "reused"]:
    return "reused" if found is not None else "runs"
