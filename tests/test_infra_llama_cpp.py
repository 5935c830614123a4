"""infra/llama_cpp.py: what it refuses, and that an interrupted run leaves nothing half-made."""

import contextlib
import importlib.util
import json
import shlex
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("infra_llama_cpp", ROOT / "infra" / "llama_cpp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_cpu_flags", lambda: {"avx", "avx2", "fma", "f16c", "bmi2"})
    return module


@pytest.fixture
def source(script, tmp_path, monkeypatch):
    """A source distribution of the real layout, with a few files, whose hash the script expects."""
    content = tmp_path / "content" / script.SOURCE_PREFIX
    for name in ("convert_hf_to_gguf.py", "conversion/llama.py", "gguf-py/gguf/quants.py", "LICENSE", "src/llama.cpp"):
        (content / name).parent.mkdir(parents=True, exist_ok=True)
        (content / name).write_text(f"# {name}\n")
    path = tmp_path / "cache" / "sdist" / f"llama_cpp_python-{script.VERSION}.tar.gz"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "content", arcname="")
    monkeypatch.setattr(script, "SDIST_SHA256", script._sha256(path))
    return path


@pytest.mark.pure
def test_pyproject_asks_for_the_version_that_is_built(script):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"{script.PACKAGE}=={script.VERSION}" in project["dependencies"]


@pytest.mark.pure
def test_the_lock_file_names_versions_and_no_places():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if line.count("==") != 1 or set("+@/ ") & set(line)] == []
    assert "torch" in {line.split("==")[0] for line in pins}


@pytest.mark.pure
def test_a_source_with_other_content_is_refused(script, source):
    source.write_bytes(source.read_bytes() + b"\0")
    with pytest.raises(script.SetupError, match=f"expected {script.SDIST_SHA256}. Delete it and try again"):
        script.sdist(source.parents[1])


@pytest.mark.pure
def test_only_the_converter_is_unpacked_and_its_identity_recorded(script, source, tmp_path):
    home = tmp_path / "venv" / "share" / "modelmint" / "llama.cpp"
    script._unpack_converter(source, home)
    recorded = json.loads((home / "source.json").read_text())
    assert list(recorded["files"]) == [
        "LICENSE",
        "conversion/llama.py",
        "convert_hf_to_gguf.py",
        "gguf-py/gguf/quants.py",
    ]
    assert recorded["files"]["LICENSE"] == script._sha256(home / "LICENSE")
    assert (recorded["version"], recorded["cmake_args"]) == (script.VERSION, script.cmake_args())
    assert [path.name for path in home.parent.iterdir()] == [home.name]
    assert script._converter_is_intact(home)


@pytest.mark.pure
def test_a_changed_converter_is_noticed_and_replaced(script, source, tmp_path):
    home = tmp_path / "llama.cpp"
    script._unpack_converter(source, home)
    (home / "conversion" / "llama.py").write_text("# changed\n")
    assert not script._converter_is_intact(home)
    script._unpack_converter(source, home)
    assert script._converter_is_intact(home)


@pytest.mark.pure
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_build_leaves_the_source_and_nothing_else(script, source, monkeypatch, failure):
    def half_a_build(*arguments, environment):
        output = Path(arguments[arguments.index("--wheel-dir") + 1])
        output.mkdir()
        (output / "half.whl").write_bytes(b"half")
        raise failure

    cache = source.parents[1]
    monkeypatch.setattr(script, "_pip", half_a_build)
    with contextlib.suppress(KeyboardInterrupt, OSError):
        script.wheel(cache)
    assert [path.name for path in cache.iterdir()] == ["sdist"]


@pytest.mark.pure
def test_a_finished_build_is_reused(script, source, monkeypatch):
    builds = []

    def build(*arguments, environment):
        builds.append(shlex.split(environment["CMAKE_ARGS"]))
        output = Path(arguments[arguments.index("--wheel-dir") + 1])
        output.mkdir()
        (output / "llama_cpp_python.whl").write_bytes(b"whole")

    monkeypatch.setattr(script, "_pip", build)
    first, second = script.wheel(source.parents[1]), script.wheel(source.parents[1])
    assert (first, first.read_bytes()) == (second, b"whole")
    assert [flags[:-1] for flags in builds] == [script.cmake_args()]
    monkeypatch.setattr(script, "NOT_NEEDED", [])
    assert script.wheel(source.parents[1]) != first


@pytest.mark.pure
def test_what_a_killed_run_left_is_cleared(script, tmp_path):
    (tmp_path / "work-killed" / "wheel").mkdir(parents=True)
    with script._lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.pure
def test_a_missing_compiler_is_named_with_the_way_out(script, source, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(script.SetupError, match=r"no C\+\+ compiler: .*apt-get install g\+\+"):
        script.wheel(source.parents[1])


@pytest.mark.pure
def test_a_cpu_without_the_instructions_is_refused_before_the_build(script, source, monkeypatch):
    monkeypatch.setattr(script.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(script, "_cpu_flags", lambda: {"avx", "fma", "f16c"})
    with pytest.raises(script.SetupError, match="this CPU lacks avx2, bmi2"):
        script.wheel(source.parents[1])


@pytest.mark.pure
def test_pip_failures_are_shown_in_full(script):
    with pytest.raises(script.SetupError, match=r"pip download failed with exit code \d+:\n(.|\n)*no such option"):
        script._pip("download", "--no-such-option")


@pytest.mark.tools
def test_this_environment_has_the_binding_and_the_converter(script):
    home = Path(sys.prefix) / "share" / "modelmint" / "llama.cpp"
    assert script._binding_is_installed()
    assert script._converter_is_intact(home)
