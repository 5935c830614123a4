"""Resolve and acquire, as tasks: what talks to a remote end is tried again when the network fails."""

from prefect import task
from prefect.client.schemas.objects import State

from modelmint import acquire as stage
from modelmint import text
from modelmint.recipe import DatasetRef, ModelRef
from modelmint.settings import Settings
from modelmint.sources import PinnedRef
from modelmint.step import Context, StepResult
from tasks.shown import NETWORK, network_failed, shown, watched


@task(name="resolve", task_run_name="resolve {ref}", retry_condition_fn=network_failed, **NETWORK)
def resolve(ref: ModelRef, settings: Settings) -> PinnedRef:
    """Pin a source: a branch becomes a commit, a folder a tree digest, S3 its versions."""
    return stage.resolve(ref, settings)


@task(name="acquire", task_run_name="acquire {pinned}", retry_condition_fn=network_failed, **NETWORK)
def acquire(pinned: PinnedRef, context: Context) -> State[StepResult]:
    """Bring a pinned checkpoint into the store, every file hashed again."""
    return shown(stage.acquire(pinned, watched(context, "acquire")))


@task(name="acquire text", task_run_name="acquire text {ref}", retry_condition_fn=network_failed, **NETWORK)
def acquire_text(ref: DatasetRef, context: Context) -> State[StepResult]:
    """Bring an evaluation or calibration text into the store."""
    return shown(text.acquire_text(ref, watched(context, "acquire text")))
