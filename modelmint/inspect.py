"""The inspect stage: what a checkpoint is, and whether it may be used, in seconds and before any heavy work.

`preview` works before the download: it fetches the small files and reads the headers of the weights by ranges.
`inspect` works on the snapshot in the store and also reads every weight once. Both judge nothing but safety and
soundness; what a recipe allows and the machine has room for is judged by `refuse`, so that what is stored depends on
files alone.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from modelmint import formats
from modelmint.acquire import fetch_checked, resolve
from modelmint.artifact import Step
from modelmint.errors import ResourceError, SourceError, UnsafeSourceError
from modelmint.host import free_disk_bytes, host
from modelmint.inspection import Inspection
from modelmint.isolate import Limits, call
from modelmint.recipe import ModelRef, Recipe
from modelmint.report import Value
from modelmint.safetensors_header import LENGTH_BYTES, header_length
from modelmint.safety import refuse_oversized
from modelmint.sandbox import sandbox
from modelmint.settings import Settings
from modelmint.sources import PinnedFile, PinnedRef, source_of
from modelmint.step import Context, StepResult, Work, Workspace, run_step
from modelmint.store import Store

__all__ = ["FILE", "Inspection", "Needs", "inspect", "inspect_source", "needs", "preview", "read_inspection", "refuse"]

STAGE_VERSION = 1
FILE = "inspection.json"
EXAMINE = "modelmint.examine:examine"
_PREVIEW_LIMITS = Limits(
    wall_seconds=120,
    memory_bytes=3 << 30,
    way_out="the checkpoint's small files are far larger than any sound one's: use another checkpoint",
)


def preview(pinned: PinnedRef, settings: Settings, wanted: Sequence[str] = ()) -> Inspection:
    """Inspect a checkpoint before it is downloaded: its small files whole, of its weights only the headers.

    Args:
        pinned: the checkpoint.
        settings: addresses, tokens and limits.
        wanted: names of formats, each of which may refuse the checkpoint.

    Raises:
        UnsafeSourceError: for a file that must not be opened.
        SourceError: if files contradict each other.
        UnsupportedError: if a format cannot take it.
        NetworkError: if the remote end failed for now.
    """
    with _outline(pinned, settings) as folder:
        inspection = _examined(folder, settings)
        refuse_formats(folder, wanted)
    return inspection.model_copy(update={"source": str(pinned), "revision": pinned.revision})


def inspect_source(ref: ModelRef, settings: Settings) -> Inspection:
    """Inspect whatever a reference names, without keeping anything; see `preview`."""
    return preview(resolve(ref, settings), settings)


def inspect(snapshot: str, context: Context) -> StepResult:
    """Inspect a checkpoint of the store, and read every weight once.

    Args:
        snapshot: digest of the checkpoint.
        context: store, settings and who asks.

    Raises:
        UnsafeSourceError: for a file that must not be opened.
        SourceError: if files contradict each other, or weights are NaN or infinite.
    """
    step = Step(stage="inspect", stage_version=STAGE_VERSION, inputs={"snapshot": snapshot})

    def work(workspace: Workspace) -> Work:
        folder = context.store.materialize(snapshot, workspace.folder / "snapshot")
        outcome = sandbox(context, workspace).call(EXAMINE, {"folder": str(folder), "scan": True})
        inspection = Inspection.model_validate(outcome.value)
        (workspace.out / FILE).write_text(inspection.model_dump_json(indent=1) + "\n")
        return Work(network_isolated=outcome.network_isolated)

    return run_step(context, step, work)


def read_inspection(result: StepResult, store: Store, pinned: PinnedRef) -> Inspection:
    """What an inspect step stored, with the name under which the checkpoint was asked for."""
    inspection = Inspection.model_validate_json(store.read(result.record.output, FILE))
    return inspection.model_copy(update={"source": str(pinned), "revision": pinned.revision})


def refuse_formats(folder: Path, wanted: Sequence[str]) -> None:
    """Ask each format whether it takes a checkpoint, by its small files.

    Raises:
        UnsupportedError: names the architecture or the pre-tokenizer that a converter does not know.
    """
    for name in wanted:
        formats.load(name).refuse_unsupported(folder)


def refuse_formats_of(snapshot: str, wanted: Sequence[str], context: Context) -> None:
    """Ask each format whether it takes a checkpoint of the store; see `refuse_formats`."""
    small = [f.path for f in context.store.artifact(snapshot).files if not f.path.endswith(".safetensors")]
    with context.store.workspace(snapshot) as folder:
        refuse_formats(context.store.materialize(snapshot, folder / "small", only=tuple(small)), wanted)


class Needs(Value):
    """What a release of a recipe takes at most, estimated.

    Attributes:
        disk_bytes: for the snapshot, the copies that tools work on, the bases and the variants.
        memory_bytes: for the largest model that is in memory at once, with its cache.
    """

    disk_bytes: int
    memory_bytes: int


def needs(inspection: Inspection, recipe: Recipe) -> Needs:
    """Estimate what a release takes."""
    bases = 2 * inspection.parameters * len(recipe.formats())
    variants = sum(formats.load(v.format).predict_size(inspection.tensors, v) for v in recipe.variants)
    bytes_per_weight = 4 if recipe.evaluation.reference == "source" and recipe.evaluation.dtype == "float32" else 2
    context = max(recipe.evaluation.window, recipe.benchmark.context if recipe.benchmark else 0)
    cache = context * inspection.cache_bytes_per_token
    return Needs(
        # Snapshot and a working copy of it; the base and its copy while it is quantized.
        disk_bytes=2 * inspection.size + 2 * bases + variants,
        memory_bytes=bytes_per_weight * inspection.parameters + cache,
    )


def refuse(inspection: Inspection, recipe: Recipe, settings: Settings, *, acquired: bool = False) -> None:
    """Refuse a checkpoint that the recipe does not allow or the machine has no room for.

    Args:
        inspection: of the checkpoint.
        recipe: says which licences are allowed and whether a quantized source is.
        settings: where the store lies.
        acquired: whether the checkpoint is in the store already; its steps then see to the disk themselves.

    Raises:
        UnsafeSourceError: if the repository wants code of its own to be run.
        SourceError: if it was quantized before, or its licence is not allowed.
        ResourceError: if it would not fit on the disk or into memory.
    """
    if inspection.repository_code and recipe.repository_code == "refuse":
        raise UnsafeSourceError(
            f"{inspection.source} wants code of its own to be run on loading (auto_map: {inspection.repository_code}), "
            "which is never done; if transformers knows the architecture without it, write repository_code: ignore; "
            "otherwise use another checkpoint"
        )
    if inspection.quantized_source and recipe.quantized_source != "accept":
        raise SourceError(
            f"{inspection.source}: {inspection.quantized_source} What quantization removed is lost, and figures would "
            "compare its variants with it, not with the original; use the original, or write quantized_source: accept"
        )
    if recipe.licenses and inspection.license not in recipe.licenses:
        named = f"has the licence {inspection.license!r}" if inspection.license else "names no licence"
        allowed = ", ".join(recipe.licenses)
        raise SourceError(f"{inspection.source} {named}, and the recipe allows {allowed}; add it to licenses if it may")
    _refuse_without_room(inspection, needs(inspection, recipe), settings, acquired)


def _refuse_without_room(inspection: Inspection, wanted: Needs, settings: Settings, acquired: bool) -> None:
    free = free_disk_bytes(settings.store)
    if not acquired and wanted.disk_bytes > free:
        raise ResourceError(
            f"{inspection.source} and its variants take about {wanted.disk_bytes / 1e9:.1f} GB, but the disk of "
            f"{settings.store} has {free / 1e9:.1f} GB free; free some, or point MODELMINT_STORE at a larger disk"
        )
    memory = settings.step_memory_bytes or host().memory_bytes
    if wanted.memory_bytes > memory:
        raise ResourceError(
            f"{inspection.source} takes about {wanted.memory_bytes / 1e9:.1f} GB of memory to measure, and there "
            f"are {memory / 1e9:.1f} GB; write evaluation: {{dtype: bfloat16}} or {{reference: base}}, or use a larger "
            "machine"
        )


@contextmanager
def _outline(pinned: PinnedRef, settings: Settings) -> Iterator[Path]:
    """A folder with a checkpoint's small files, and its weight files as their headers with a hole behind."""
    source = source_of(pinned.ref)
    for file in pinned.files:
        refuse_oversized(file.path, file.size)
    with tempfile.TemporaryDirectory(prefix="modelmint-") as scratch:
        folder = Path(scratch) / "checkpoint"
        for file in pinned.files:
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if not file.path.endswith(".safetensors"):
                fetch_checked(pinned, file, target, settings, lambda count: None)
                continue

            def read(start: int, length: int, file: PinnedFile = file) -> bytes:
                return source.read_range(pinned, file, start, length, settings)

            first = read(0, 1024)
            target.write_bytes(first)
            # A header that cannot be one stays as it is: the examination says what the file is instead.
            if first[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{":
                length = header_length(file.path, file.size, first[:LENGTH_BYTES])
                target.write_bytes(read(0, LENGTH_BYTES + length))
            with target.open("r+b") as stream:
                stream.truncate(file.size)
        yield folder


def _examined(folder: Path, settings: Settings) -> Inspection:
    outcome = call(
        EXAMINE,
        {"folder": str(folder), "scan": False},
        limits=_PREVIEW_LIMITS,
        require_isolation=settings.require_isolation,
    )
    return Inspection.model_validate(outcome.value)
