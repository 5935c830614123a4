"""The upkeep of a store: what is in it, whether it is sound, and what can go."""

import json
import os
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from crashing import left_in_tmp, put, run_chain, step

from modelmint.artifact import Step, StepRecord, digest_of_bytes
from modelmint.errors import NonDeterminismError, ResourceError
from modelmint.step import Context, Work, Workspace, run_step
from modelmint.store import Store
from modelmint.upkeep import PUBLISHED_FILE, GcPlan, collect, listing, plan_gc, releases
from modelmint.verify import verify

pytestmark = pytest.mark.pure


def made(context: Context, name: str, content: bytes, **inputs: str) -> StepRecord:
    asked = Step(stage="quantize", stage_version=1, parameters={"type": name, "pure": True}, inputs=inputs)
    return run_step(context, asked, partial(put, model=content)).record


def released(store: Store, name: str, recipe: str, *records: StepRecord, age: float = 0) -> Path:
    """A release that names its outputs and keys deep inside of its lock, as a later version may."""
    steps = [{"key": record.key, "output": record.output} for record in records]
    lock = json.dumps({"schema": 1, "recipe": {"name": recipe}, "later": {"steps": steps}}).encode()
    folder = store.write_release(name, {"lock.json": lock})
    then = time.time() - age
    os.utime(folder / "lock.json", (then, then))
    return folder


def kinds(plan: GcPlan) -> list[str]:
    return [item.kind for item in plan.items]


def files_of(store: Store) -> set[str]:
    return {store.inside(path) for path in store.root.rglob("*") if path.is_file()}


# Soundness.


def test_a_sound_store_is_found_so(context: Context) -> None:
    run_chain(context)
    report = verify(context.store)
    assert report.sound
    assert (report.artifacts, report.records, report.blobs) == (3, 3, 4)
    assert report.blob_bytes == sum(path.stat().st_size for path in context.store.blobs())
    assert (report.orphans, report.incomplete, report.conflicts, report.repaired) == (0, (), (), False)


def test_an_empty_store_is_sound(store: Store) -> None:
    assert verify(store).sound


def test_each_kind_of_damage_is_named_and_removed_only_when_asked(context: Context) -> None:
    store = context.store
    one, two, three, four = (made(context, f"Q{n}", b"%d" % n) for n in range(4))
    blob = store.blob(store.artifact(one.output).files[0])
    for path, content in (
        (blob, b"X"),
        (store.manifest(two.output), b"{}"),
        (store.record_file(three.key), b"torn"),
        (store.record_file(four.key), store.record_file(one.key).read_bytes()),
    ):
        path.chmod(0o644)
        path.write_bytes(content)

    report = verify(store)
    assert not report.sound
    named = {damage.path: damage.what for damage in report.damaged}
    expected = {
        blob: f"blob sha256:{blob.parent.name}{blob.name} has digest {digest_of_bytes(b'X')}",
        store.manifest(two.output): f"manifest of {two.output} has digest {digest_of_bytes(b'{}')}",
        store.record_file(three.key): f"record of {three.key} cannot be read: Invalid JSON",
        store.record_file(four.key): f"record of {four.key} is of another step, {one.key}",
    }
    assert set(named) == {store.inside(path) for path in expected}
    for path, what in expected.items():
        assert named[store.inside(path)].startswith(what)
    assert set(report.incomplete) == {one.key, two.key}
    assert blob.read_bytes() == b"X"

    assert verify(store, repair=True).damaged == report.damaged
    repaired = verify(store)
    assert repaired.damaged == ()
    assert not blob.exists()
    assert set(repaired.incomplete) == {one.key, two.key}
    for n in range(4):
        made(context, f"Q{n}", b"%d" % n)
    assert verify(store).sound
    assert verify(store).incomplete == ()


def test_orphans_are_counted_and_are_no_damage(context: Context) -> None:
    run_chain(context)
    (context.store.root.parent / "o").mkdir()
    (context.store.root.parent / "o" / "f").write_bytes(b"12345")
    orphan = context.store.add_folder(context.store.root.parent / "o")
    context.store.manifest(orphan.digest).unlink()
    report = verify(context.store)
    assert report.sound
    assert (report.orphans, report.orphan_bytes) == (1, 5)


def test_a_conflict_is_reported_until_somebody_has_looked_at_it(context: Context) -> None:
    store = context.store
    first = made(context, "Q8_0", b"1")
    store.blob(store.artifact(first.output).files[0]).unlink()
    with pytest.raises(NonDeterminismError, match="two different outputs"):
        made(context, "Q8_0", b"2")
    report = verify(store)
    assert not report.sound
    assert report.conflicts == (store.inside(store.conflicts()[0]),)
    # The auditor compares bytes, so the second output is not garbage.
    assert "blob" not in kinds(plan_gc(store, 0))
    store.conflicts()[0].unlink()
    assert "blob" in kinds(plan_gc(store, 0))


# What is in it.


def test_the_listing_says_what_each_result_is_and_who_needs_it(context: Context) -> None:
    one, two = made(context, "Q8_0", b"11"), made(context, "Q4_0", b"2222")
    released(context.store, "smol-1", "smol", one)
    released(context.store, "smol-2", "smol", one, two)
    context.store.blob(context.store.artifact(two.output).files[0]).unlink()
    first, second = listing(context.store)
    assert (first.stage, first.parameters, first.size, first.whole) == ("quantize", "pure=true type=Q8_0", 2, True)
    assert (first.digest, first.key, first.finished) == (one.output, one.key, one.finished)
    assert first.releases == ("smol-1", "smol-2")
    assert (second.parameters, second.size, second.whole, second.releases) == (
        "pure=true type=Q4_0",
        4,
        False,
        ("smol-2",),
    )


def test_a_long_summary_is_cut(context: Context) -> None:
    asked = Step(
        stage="text", stage_version=1, parameters={"text": "x" * 500, "none": None, "empty": {}, "list": [1, "é"]}
    )
    run_step(context, asked, partial(put, text=b"t"))
    (row,) = listing(context.store)
    assert row.parameters.startswith('list=[1,"é"] text=xxxx')
    assert len(row.parameters) == 80
    assert row.parameters.endswith("x…")


def test_a_release_without_its_lock_is_none(context: Context) -> None:
    context.store.write_release("half", {"report.json": b"{}"})
    assert releases(context.store) == []


# What can go.


def test_what_a_kept_release_needs_stays_with_all_that_it_was_made_of(context: Context) -> None:
    store = context.store
    source, base, quantized = (result.record for result in run_chain(context))
    released(store, "smol-1", "smol", quantized)
    left = made(context, "Q4_0", b"unneeded", base=base.output)
    plan = plan_gc(store, 1)
    assert plan.kept == ("smol-1",)
    assert kinds(plan) == ["record", "manifest", "blob", "lock"]
    assert [item.label for item in plan.items] == [
        "quantize pure=true type=Q4_0",
        "model",
        "model",
        "of a step that is not kept",
    ]
    assert plan.size == sum(item.size for item in plan.items)
    assert plan.items[2].size == len(b"unneeded")

    before = files_of(store)
    freed = collect(store, plan)
    assert freed.items == plan.items
    assert freed.size == plan.size
    assert before - files_of(store) == {item.path for item in plan.items}
    assert store.record(left.key) is None
    for record in (source, base, quantized):
        assert store.record(record.key) == record
    assert plan_gc(store, 1).items == ()
    assert verify(store).sound


def test_a_plan_changes_nothing(context: Context) -> None:
    run_chain(context)
    before = files_of(context.store)
    assert kinds(plan_gc(context.store, 0)) == ["record"] * 3 + ["manifest"] * 3 + ["blob"] * 4 + ["lock"] * 3
    assert files_of(context.store) == before


def test_the_last_releases_of_each_recipe_and_the_published_ones_are_kept(context: Context) -> None:
    store = context.store
    records = [made(context, f"Q{n}", b"%d" % n) for n in range(5)]
    released(store, "a-old", "a", records[0], age=300)
    published = released(store, "a-published", "a", records[1], age=200)
    (published / PUBLISHED_FILE).write_bytes(b"")
    released(store, "a-new", "a", records[2], age=100)
    released(store, "b-only", "b", records[3], age=400)
    assert [release.name for release in releases(store)] == ["b-only", "a-old", "a-published", "a-new"]
    assert [release.published for release in releases(store)] == [False, False, True, False]

    def kept(last: int) -> tuple[str, ...]:
        return plan_gc(store, last).kept

    assert kept(0) == ("a-published",)
    assert kept(1) == ("b-only", "a-published", "a-new")
    assert kept(3) == ("b-only", "a-old", "a-published", "a-new")
    with pytest.raises(ValueError, match="keep_last = -1"):
        kept(-1)
    collect(store, plan_gc(store, 1))
    there = [store.record(record.key) is not None for record in records]
    assert there == [False, True, True, True, False]
    # Its documents are small, and the only memory of it.
    assert (store.root / "releases" / "a-old" / "lock.json").exists()


def test_contents_that_two_results_share_stay_with_the_one_that_is_kept(context: Context) -> None:
    one = made(context, "Q8_0", b"same")
    asked = step("export")
    run_step(context, asked, partial(put, exported=b"same"))
    released(context.store, "smol-1", "smol", one)
    collect(context.store, plan_gc(context.store, 1))
    assert context.store.read(one.output, "model") == b"same"
    assert context.store.record(asked.key) is None


def test_what_a_lock_names_by_the_digest_of_a_file_stays(context: Context) -> None:
    one = made(context, "Q8_0", b"data")
    entry = context.store.artifact(one.output).files[0]
    context.store.write_release("r", {"lock.json": json.dumps({"recipe": "r", "data": entry.digest}).encode()})
    collect(context.store, plan_gc(context.store, 1))
    assert context.store.blob(entry).exists()
    assert context.store.record(one.key) is None


def test_remains_go_too(context: Context) -> None:
    store = context.store
    run_chain(context)
    (store.root / "downloads" / "abc" / "deep").mkdir(parents=True)
    (store.root / "downloads" / "abc" / "deep" / "part").write_bytes(b"123")
    (store.root / "tmp" / "dead").mkdir()
    (store.root / "tmp" / "dead" / "file").write_bytes(b"12345")
    store.record_file(step("unreadable").key).write_bytes(b"torn")
    plan = plan_gc(store, 0)
    sizes = {(item.kind, item.label): item.size for item in plan.items}
    assert sizes["download", "an unfinished download"] == 3
    assert sizes["scratch", "left by a process that was killed"] == 5
    assert sizes["record", "unreadable"] == 4
    collect(store, plan)
    assert left_in_tmp(store) == []
    assert list((store.root / "downloads").iterdir()) == []
    assert {path.split("/")[0] for path in files_of(store)} == {"locks"}


def test_garbage_collection_waits_for_a_running_step_and_gives_up_in_time(context: Context) -> None:
    plan = GcPlan(keep_last=0, kept=(), items=())
    with context.store.in_use("release smol-1"):
        started = time.monotonic()
        with pytest.raises(
            ResourceError, match=r"in-use was not free within 0.1 s for garbage collection.*release smol-1"
        ):
            collect(context.store, plan, wait_seconds=0.1)
        assert time.monotonic() - started < 2
        # A step inside of a release that is in use is not kept waiting by who wants to collect.
        waiting = threading.Thread(target=collect, args=(context.store, plan))
        waiting.start()
        time.sleep(0.05)
        assert not run_step(context, step("convert"), partial(put, model=b"m")).reused
    waiting.join(10)
    assert not waiting.is_alive()


def test_what_is_needed_again_by_then_is_kept_after_all(context: Context) -> None:
    one = made(context, "Q8_0", b"1")
    plan = plan_gc(context.store, 1)
    assert len(plan.items) == 4
    released(context.store, "smol-1", "smol", one)
    collected = collect(context.store, plan)
    assert collected.items == ()
    assert collected.kept_after_all == 4
    assert context.store.record(one.key) == one


def test_records_go_before_manifests_before_blobs(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash on the way leaves orphans; never a record without its blobs."""
    run_chain(context)
    store = context.store
    plan = plan_gc(store, 0)
    order: list[str] = []
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        assert not_whole(store) == ()
        order.append(path.relative_to(store.root).parts[0])
        real(path, missing_ok)

    def fsync(descriptor: int) -> None:
        order.append(
            "fsync " + Path(f"/proc/self/fd/{descriptor}").resolve().relative_to(store.root.resolve()).parts[0]
        )

    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(os, "fsync", fsync)
    collect(store, plan)
    blob_folders = len({path.split("/")[2] for path in (item.path for item in plan.items if item.kind == "blob")})
    assert order == [
        *["steps"] * 3,
        "fsync steps",
        *["artifacts"] * 3,
        "fsync artifacts",
        *["blobs"] * 4,
        *["fsync blobs"] * blob_folders,
        *["locks"] * 3,
        "fsync locks",
    ]


def not_whole(store: Store) -> tuple[str, ...]:
    """Keys of records whose output is not whole, as any reader would find."""
    return tuple(key for key in store.step_keys() if store.record(key) is None)


def test_garbage_collection_works_on_a_full_disk(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    run_chain(context)
    plan = plan_gc(context.store, 0)

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "mkdir", full)
    assert collect(context.store, plan).size == plan.size
    assert list(context.store.blobs()) == []


def test_a_lock_that_is_held_is_not_removed(context: Context) -> None:
    made(context, "Q8_0", b"1")

    def work(place: Workspace) -> Work:
        assert "lock" in kinds(plan_gc(context.store, 0))
        held = [item.path for item in plan_gc(context.store, 0).items if item.kind == "lock"]
        assert context.store.inside(context.store.lock_file(step("convert").key)) not in held
        return put(place, model=b"m")

    run_step(replace(context, store=Store(context.store.root)), step("convert"), work)
