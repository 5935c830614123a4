"""What was made: digests, manifests of files, and the record of the step that made them.

Laws, tested under the same words:

* a digest names its algorithm;
* a manifest is sorted, and its digest is a function of its (path, size, sha256) entries alone;
* canonical JSON is one text for one value, so that a key computed anywhere is the same key.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, StringConstraints, model_validator

from modelmint.report import Measurement, Value

CHUNK_BYTES = 4 << 20

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
"""A content digest with its algorithm in front: ``sha256:`` and 64 hexadecimal digits."""


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no white space, UTF-8, no NaN.

    Args:
        value: what `json` can write: str, int, float, bool, None, and lists, tuples and str-keyed dicts of these.

    Raises:
        ValueError: for NaN and infinities, which have no JSON text.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of_bytes(content: bytes) -> str:
    """The digest of bytes in memory."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def digest_of_file(path: Path) -> str:
    """The digest of a file's contents, read in chunks of 4 MiB.

    Raises:
        OSError: if the file cannot be read.
    """
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while count := stream.readinto(buffer):
            state.update(buffer[:count])
    return "sha256:" + state.hexdigest()


def _inside(path: str) -> str:
    """Refuse a path that could leave the folder it is written into."""
    pure = PurePosixPath(path)
    if not pure.parts or "\0" in path or "\\" in path or pure.is_absolute() or ".." in pure.parts or str(pure) != path:
        raise ValueError(f"not a clean relative path: {path!r}")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
"""A POSIX path inside an artifact: relative, normal, without ``..``."""


class FileEntry(Value):
    """One file of an artifact: where it lies, how large it is, and what is in it."""

    path: RelativePath
    size: int = Field(ge=0)
    digest: Digest


class Artifact(Value):
    """A manifest: the files of one checkpoint, variant, reference or evaluation set.

    Attributes:
        schema_version: version of this document's layout.
        files: sorted by path, each path once.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    files: tuple[FileEntry, ...] = Field(min_length=1)

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    @classmethod
    def of(cls, files: Iterable[FileEntry]) -> Self:
        """The artifact of these files, in whatever order they come."""
        return cls(files=tuple(sorted(files, key=lambda entry: entry.path)))

    @model_validator(mode="after")
    def _sorted_and_unique(self) -> Self:
        paths = [entry.path for entry in self.files]
        if paths != sorted(set(paths)):
            raise ValueError("the files of a manifest are sorted by path, each path once")
        return self

    @property
    def digest(self) -> str:
        """The digest of the manifest's canonical JSON."""
        return digest_of_bytes(self.to_json())

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> bytes:
        """The text that is stored and hashed."""
        return canonical_json(self.model_dump(mode="json"))

    def file(self, path: str) -> FileEntry:
        """The entry of one path.

        Raises:
            KeyError: if the artifact has no such file.
        """
        for entry in self.files:
            if entry.path == path:
                return entry
        raise KeyError(path)


class Tool(Value):
    """The identity of one tool that can change a step's output.

    Attributes:
        name: the distribution's name.
        version: its version.
        source: digest of the source distribution it was built from; None for a plain package of the index.
        flags: compile flags, in the order they were given.
    """

    name: str
    version: str
    source: Digest | None = None
    flags: tuple[str, ...] = ()


class Step(Value):
    """A piece of work before it is done: all that can change its output, and nothing else.

    Attributes:
        stage: the stage's name, a verb such as ``quantize``.
        stage_version: raised whenever the stage's own code starts to give other bytes.
        parameters: plain JSON values.
        inputs: digests of artifacts by their role.
        tools: identities of the tools used.
        observation: True for measurements and references: a second, different output is no contradiction; first wins.
    """

    stage: str
    stage_version: int = Field(ge=1)
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    inputs: dict[str, Digest] = Field(default_factory=dict)
    tools: tuple[Tool, ...] = ()
    observation: bool = False

    @property
    def key(self) -> str:
        """The digest of the step's canonical JSON: the name under which its result is kept."""
        body = self.model_dump(mode="json", exclude={"observation"})
        body["tools"] = sorted(body["tools"], key=lambda tool: str(tool["name"]))
        return digest_of_bytes(canonical_json({"schema": 1, **body}))


class Invocation(Value):
    """Who ran a step: ids of the orchestrator's and the tracker's runs, empty where there were none."""

    flow_run: str = ""
    tracking_run: str = ""
    release: str = ""


class StepRecord(Value):
    """The proof that a step is done, written last.

    Attributes:
        schema_version: version of this document's layout.
        key: the step's key.
        step: what was asked.
        output: digest of the artifact it made.
        seconds: wall-clock time of the work.
        finished: when it was recorded, ISO 8601 in UTC.
        host: name of the machine.
        invocation: the runs it belonged to.
        measurements: properties of the output that fell out of the work, such as effective bits per weight.
        notes: sentences for the report, such as which tensors fell back to another type.
        network_isolated: whether the work was done without network; None where it needs the network or runs no tool.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    key: Digest
    step: Step
    output: Digest
    seconds: float = Field(ge=0)
    finished: str
    host: str
    invocation: Invocation = Invocation()
    measurements: tuple[Measurement, ...] = ()
    notes: tuple[str, ...] = ()
    network_isolated: bool | None = None

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    @model_validator(mode="after")
    def _key_fits(self) -> Self:
        if self.key != self.step.key:
            raise ValueError(f"the record's key {self.key} is not the key of its step, {self.step.key}")
        return self
