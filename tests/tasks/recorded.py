"""A made-up release whose variants really lie in a store, for the tests of its record."""

import hashlib
from pathlib import Path

import pytest
from sample_release import sample

from modelmint.artifact import Invocation
from modelmint.release import ReleaseReport, VariantReport
from modelmint.settings import Settings
from modelmint.step import Context
from modelmint.store import Store

MLFLOW_WARNS = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
"""MLflow still asks SQLAlchemy for something that is to go."""


def context_in(home: Path, tracking: str = "") -> Context:
    """A context whose store and record lie in a folder of their own."""
    settings = Settings.model_validate({"home": home, "store_folder": home / "store", "tracking": tracking})
    return Context(Store(settings.store), settings, Invocation(flow_run="flow-run-1"))


def contents(variant: str) -> bytes:
    """What the file of a variant holds."""
    return hashlib.sha256(variant.encode()).digest() * 4096


def stored_release(context: Context, recipe: str, name: str = "release-1") -> ReleaseReport:
    """The sample release under a name of its own, with its variants and documents in the store of a context."""
    report = sample()
    digests = {variant.digest: _put(context.store, recipe, variant) for variant in report.variants}

    def placed(variant: VariantReport) -> VariantReport:
        steps = tuple(
            step.model_copy(update={"output": digests.get(step.output, step.output)}) for step in variant.steps
        )
        update = {"digest": digests[variant.digest], "base": digests.get(variant.base, ""), "steps": steps}
        return variant.model_copy(update=update)

    report = report.model_copy(
        update={
            "release": name,
            "recipe": report.recipe.model_copy(update={"name": recipe}),
            "variants": tuple(placed(variant) for variant in report.variants),
            "continues": "",
        }
    )
    write_documents(context, report)
    return report


def write_documents(context: Context, report: ReleaseReport) -> None:
    """Keep what a release writes into the store."""
    documents = {"report.json": report.to_json(), "report.html": b"<h1>report</h1>", "lock.json": b"{}"}
    context.store.write_release(report.release, documents)


def renamed(context: Context, report: ReleaseReport, name: str) -> ReleaseReport:
    """The same release once more under another name."""
    again = report.model_copy(update={"release": name})
    write_documents(context, again)
    return again


def _put(store: Store, recipe: str, variant: VariantReport) -> str:
    with store.workspace(variant.digest) as folder:
        (folder / "model.gguf").write_bytes(contents(variant.variant) + recipe.encode())
        return store.add_folder(folder).digest
