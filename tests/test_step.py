"""The step runner: each step once, each error with the step that it concerns."""

import errno
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from crashing import left_in_tmp, put, step

from modelmint import step as runner
from modelmint.artifact import Invocation
from modelmint.errors import ModelMintError, NonDeterminismError, ResourceError, SourceError, StageError, ToolError
from modelmint.files import is_full
from modelmint.locks import held, is_free
from modelmint.report import Measurement
from modelmint.step import Context, Machine, StepResult, Work, Workspace, run_step, run_steps
from modelmint.store import Store

pytestmark = pytest.mark.pure


def never(place: object) -> Work:
    raise AssertionError("a step that is done was done again")


def done(result: StepResult | ModelMintError) -> StepResult:
    assert isinstance(result, StepResult)
    return result


def test_a_step_is_done_once_and_its_record_says_how(context: Context) -> None:
    size = Measurement(measure="size", value=5.0)

    def work(place: Workspace) -> Work:
        put(place, model=b"model")
        time.sleep(0.02)
        return Work(measurements=(size,), notes=("a note",), network_isolated=True)

    asked = replace(context, invocation=Invocation(flow_run="f", tracking_run="t", release="r"))
    result = run_step(asked, step("convert"), work)
    record = result.record
    assert not result.reused
    assert context.store.read(record.output, "model") == b"model"
    assert record.step == step("convert")
    assert (record.measurements, record.notes, record.network_isolated) == ((size,), ("a note",), True)
    assert record.invocation == asked.invocation
    assert record.host == os.uname().nodename
    assert 0.02 <= record.seconds < 5
    assert timedelta() <= datetime.now(UTC) - datetime.fromisoformat(record.finished) < timedelta(minutes=1)
    assert run_step(context, step("convert"), never) == StepResult(record, True)
    assert left_in_tmp(context.store) == []


def test_a_workspace_has_fixed_names_and_the_steps_lock(context: Context) -> None:
    """Converters write the name of their folder into what they make."""

    def work(place: Workspace) -> Work:
        assert (place.folder.name, place.out.name) == ("work", "out")
        assert list(place.folder.iterdir()) == list(place.out.iterdir()) == []
        lock = context.store.lock_file(step("convert").key)
        assert os.path.samestat(os.fstat(place.lock), lock.stat())
        assert not is_free(lock)
        return put(place, model=b"m")

    run_step(context, step("convert"), work)
    assert is_free(context.store.lock_file(step("convert").key))


def test_work_that_leaves_nothing_is_an_error_that_names_the_stage(context: Context) -> None:
    with pytest.raises(ToolError, match="convert reported success and wrote nothing"):
        run_step(context, step("convert"), lambda place: Work())
    with pytest.raises(StageError, match="is empty, and an artifact has at least one file"):
        run_step(context, step("convert"), lambda place: (place.out / "empty").mkdir() or Work())
    assert context.store.record(step("convert").key) is None


@pytest.mark.parametrize(
    "error", [ToolError("the tool crashed"), SourceError("moved"), RuntimeError("a defect of ours")]
)
def test_what_the_work_raises_reaches_the_caller_and_the_step_can_be_done_again(
    context: Context, error: Exception
) -> None:
    def work(place: Workspace) -> Work:
        put(place, half=b"h")
        raise error

    with pytest.raises(type(error), match=str(error)) as raised:
        run_step(context, step("convert"), work)
    assert raised.value is error
    assert left_in_tmp(context.store) == []
    assert not run_step(context, step("convert"), partial(put, model=b"m")).reused


def test_other_bytes_for_a_key_are_a_conflict(context: Context) -> None:
    """As where the store lost its first result, and a tool is not deterministic."""
    first = run_step(context, step("convert"), partial(put, model=b"1")).record
    context.store.blob(context.store.artifact(first.output).files[0]).unlink()
    with pytest.raises(NonDeterminismError, match=f"convert gave two different outputs for one key, {first.key}"):
        run_step(context, step("convert"), partial(put, model=b"2"))
    assert len(context.store.conflicts()) == 1


def test_who_waited_for_a_step_finds_it_done(context: Context) -> None:
    begun, may_end = threading.Event(), threading.Event()
    results: list[StepResult] = []

    def work(place: Workspace) -> Work:
        begun.set()
        assert may_end.wait(10)
        return put(place, model=b"m")

    one = threading.Thread(target=lambda: results.append(run_step(context, step("convert"), work)))
    other = threading.Thread(target=lambda: results.append(run_step(context, step("convert"), never)))
    one.start()
    assert begun.wait(10)
    other.start()
    time.sleep(0.05)
    assert not results
    may_end.set()
    one.join()
    other.join()
    assert sorted(result.reused for result in results) == [False, True]


# Several steps in one piece of work.


def test_only_what_is_missing_is_worked_on(context: Context) -> None:
    steps = {name: step("benchmark", variant=digest) for name, digest in zip("abc", digests(context), strict=True)}
    run_step(context, steps["b"], partial(put, figures=b"b"))
    asked: list[set[str]] = []
    started = time.monotonic()

    def work(places: Mapping[str, Workspace]) -> dict[str, Work | ModelMintError]:
        asked.append(set(places))
        time.sleep(0.05)
        return {name: put(place, figures=name.encode()) for name, place in places.items()}

    results = run_steps(context, steps, work, machine="alone")
    assert asked == [{"a", "c"}]
    assert list(results) == ["a", "b", "c"]
    assert {name: done(result).reused for name, result in results.items()} == {"a": False, "b": True, "c": False}
    for name, result in results.items():
        assert context.store.read(done(result).record.output, "figures") == name.encode()
    # Work done together is not counted twice.
    seconds = [done(results[name]).record.seconds for name in "ac"]
    assert seconds[0] == seconds[1]
    assert 0.05 <= sum(seconds) < time.monotonic() - started
    assert all(done(result).reused for result in run_steps(context, steps, never, machine="alone").values())  # type: ignore[arg-type]


def digests(context: Context) -> list[str]:
    return [run_step(context, step(f"quantize-{n}"), partial(put, model=b"%d" % n)).record.output for n in range(3)]


def test_an_error_of_one_name_leaves_the_others_alone(context: Context) -> None:
    steps = {name: step(name) for name in ("crashes", "empty", "forgotten", "good")}
    crash = ToolError("aborted", signal="SIGABRT")

    def work(places: Mapping[str, Workspace]) -> dict[str, Work | ModelMintError]:
        return {"good": put(places["good"], model=b"m"), "empty": Work(), "crashes": crash}

    results = run_steps(context, steps, work)
    assert results["crashes"] is crash
    assert "empty reported success and wrote nothing" in str(results["empty"])
    assert "forgotten: the work ended without a word about it" in str(results["forgotten"])
    assert done(results["good"]).record.key == steps["good"].key
    assert {record.key for record in context.store.records()} == {steps["good"].key}


def test_an_error_of_all_the_work_is_every_missing_names_error(context: Context) -> None:
    steps = {name: step(name) for name in ("a", "b", "c")}
    run_step(context, steps["b"], partial(put, model=b"m"))
    crash = ToolError("the harness crashed")

    def work(places: Mapping[str, Workspace]) -> dict[str, Work | ModelMintError]:
        raise crash

    results = run_steps(context, steps, work)
    assert results["a"] is results["c"] is crash
    assert done(results["b"]).reused


def test_one_step_under_two_names_is_done_once(context: Context) -> None:
    asked: list[list[str]] = []

    def work(places: Mapping[str, Workspace]) -> dict[str, Work | ModelMintError]:
        asked.append(list(places))
        return {name: put(place, model=b"m") for name, place in places.items()}

    results = run_steps(context, {"one": step("convert"), "two": step("convert")}, work)
    assert asked == [["one"]]
    assert results["one"] == results["two"]


def test_steps_asked_for_in_opposite_order_do_not_wait_for_each_other(context: Context) -> None:
    steps = {name: step(name) for name in "abcd"}
    backwards = dict(reversed(steps.items()))

    def work(places: Mapping[str, Workspace]) -> dict[str, Work | ModelMintError]:
        time.sleep(0.02)
        return {name: put(place, model=b"m") for name, place in places.items()}

    threads = [threading.Thread(target=run_steps, args=(context, asked, work)) for asked in (steps, backwards) * 3]
    for thread in threads:
        thread.daemon = True
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert len(list(context.store.records())) == 4


# What a step asks of the machine.


@pytest.mark.parametrize(
    ("machine", "beside"),
    [("network", {"network", "shared", "alone"}), ("shared", {"network", "shared"}), ("alone", {"network"})],
)
def test_a_step_takes_its_share_of_the_machine(context: Context, machine: Machine, beside: set[Machine]) -> None:
    """What others can still have while such a step works."""
    lock, turnstile = context.settings.host_lock / "machine", context.settings.host_lock / "turnstile"

    def can_have(share: Machine) -> bool:
        if share == "network":
            return True
        context.settings.host_lock.mkdir(exist_ok=True)
        try:
            with (
                held(turnstile, "a look", shared=share == "shared", wait_seconds=0),
                held(lock, "a look", shared=share == "shared", wait_seconds=0),
            ):
                return True
        except ResourceError:
            return False

    def work(place: Workspace) -> Work:
        shares: tuple[Machine, ...] = ("network", "shared", "alone")
        assert {share for share in shares if can_have(share)} == beside
        return put(place, model=b"m")

    run_step(context, step("convert"), work, machine=machine)
    assert can_have("alone")


def test_two_stores_on_one_host_share_its_lock(context: Context, tmp_path: Path) -> None:
    other = replace(context, store=Store(tmp_path / "other"))
    events: list[str] = []

    def benchmark(place: Workspace) -> Work:
        events.append("begins")
        time.sleep(0.05)
        events.append("ends")
        return put(place, figures=b"f")

    threads = [
        threading.Thread(target=partial(run_step, where, step("benchmark"), benchmark, machine="alone"))
        for where in (context, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events == ["begins", "ends"] * 2


def test_the_store_is_in_use_while_a_step_works(context: Context) -> None:
    def work(place: Workspace) -> Work:
        with (
            pytest.raises(ResourceError, match=r"in-use was not free within 0 s for garbage collection.*\(a step\)"),
            context.store.not_in_use("garbage collection", 0),
        ):
            pass
        return put(place, model=b"m")

    run_step(context, step("convert"), work)
    with context.store.not_in_use("garbage collection", 0):
        pass


# A full disk, however a tool tells of it.


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_in_the_work_names_the_disk(context: Context, code: int) -> None:
    def work(place: Workspace) -> Work:
        raise OSError(code, os.strerror(code))

    with pytest.raises(ResourceError, match=rf"disk mounted at /.* has \d+ of \d+ bytes free \({os.strerror(code)}\)"):
        run_step(context, step("convert"), work)


@pytest.mark.parametrize(("free", "full"), [(0, True), (1023, True), (1024, False)])
def test_a_disk_with_less_than_a_mebibyte_free_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, full: bool
) -> None:
    class Usage:
        f_frsize, f_bfree, f_bavail = 1024, free, free

    monkeypatch.setattr(os, "statvfs", lambda folder: Usage())
    assert is_full(tmp_path) is full


def test_a_tool_that_fails_on_a_full_disk_is_said_to_have_done_so(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(place: Workspace) -> Work:
        raise ToolError("exit code 1: write failed")

    def answers(places: Mapping[str, Workspace]) -> dict[str, Work | ModelMintError]:
        return {"a": ToolError("exit code 1"), "b": put(places["b"], model=b"m"), "c": SourceError("moved")}

    monkeypatch.setattr(runner, "is_full", lambda folder: True)
    with pytest.raises(ResourceError, match=r"a stage failed on it: exit code 1: write failed") as raised:
        run_step(context, step("convert"), raises)
    assert isinstance(raised.value.__cause__, ToolError)
    results = run_steps(context, {name: step(name) for name in "abc"}, answers)
    assert isinstance(results["a"], ResourceError)
    assert isinstance(results["b"], StepResult)
    assert isinstance(results["c"], SourceError)
