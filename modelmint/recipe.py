"""What is wanted: which model, which variants, which data, and which gates they must pass.

Laws, tested under the same words:

* the text form of a model reference and of a variant's name round-trips;
* a variant's name, ``format:type[@label]``, is unique in its recipe;
* a recipe is data: two equal recipes have one digest, and nothing in it is looked up when it is read.
"""

import re
from typing import Literal, Self

from pydantic import ConfigDict, Field, JsonValue, field_validator, model_validator

from modelmint.artifact import canonical_json, digest_of_bytes
from modelmint.report import DEFAULT_GATES, MEASURES, Bound, Value
from modelmint.spelling import did_you_mean

SCHEMES = {
    "hf": "hf:organization/name[@revision], a repository of the Hugging Face Hub",
    "file": "file:path, a folder on this machine (for data: a text file)",
    "s3": "s3://bucket/prefix, a prefix of a bucket (for data: an object)",
    "fake": "fake:name, a made-up checkpoint for dry runs and tests",
}
"""The kinds of model reference by scheme, each with its form."""


class ModelRef(Value):
    """Where a checkpoint is to be found, before it is pinned.

    Attributes:
        scheme: a key of `SCHEMES`.
        location: what follows the scheme: repository, path, or bucket and prefix.
        revision: branch, tag or commit; empty for the default branch, and for schemes without revisions.
    """

    scheme: Literal["hf", "file", "s3", "fake"]
    location: str = Field(min_length=1)
    revision: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form; the inverse of `str`.

        Raises:
            ValueError: for an unknown scheme, an empty location or a malformed repository name.
        """
        scheme, colon, rest = text.partition(":")
        if not colon or scheme not in SCHEMES:
            known = "; ".join(SCHEMES.values())
            raise ValueError(f"not a model reference: {text!r}; write one of: {known}")
        revision = ""
        if scheme == "s3":
            if not rest.startswith("//"):
                raise ValueError(f"not an S3 address: {text!r}; write s3://bucket/prefix")
            rest = rest[2:].rstrip("/")
        elif scheme == "hf":
            rest, _, revision = rest.partition("@")
        return cls.model_validate({"scheme": scheme, "location": rest, "revision": revision})

    def __str__(self) -> str:
        slashes = "//" if self.scheme == "s3" else ""
        return f"{self.scheme}:{slashes}{self.location}" + (f"@{self.revision}" if self.revision else "")

    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        if self.scheme == "hf" and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.location):
            raise ValueError(f"not a repository of the Hub: {self.location!r}; write organization/name")
        if self.scheme == "s3" and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.+)?", self.location):
            raise ValueError(f"not a bucket and prefix: {self.location!r}; write bucket/prefix")
        if self.revision and self.scheme != "hf":
            raise ValueError(f"{self.scheme}: takes no revision, but {self.revision!r} was given")
        return self

    @property
    def model_name(self) -> str:
        """The last part of the location: what the model and its files are called."""
        return self.location.rstrip("/").rpartition("/")[2]


class DatasetRef(Value):
    """A text to evaluate or calibrate on.

    Attributes:
        source: ``pydoc`` (the documentation topics that come with Python), ``file:path``, ``s3://bucket/key``, or
            ``hf:organization/name`` with `split` and `column`.
        split: of a Hugging Face dataset.
        column: of a Hugging Face dataset.
        config: of a Hugging Face dataset; empty for its default.
    """

    source: str = "pydoc"
    split: str = "test"
    column: str = "text"
    config: str = ""

    @field_validator("source")
    @classmethod
    def _known(cls, source: str) -> str:
        if source != "pydoc" and ModelRef.parse(source).scheme == "fake":
            raise ValueError(f"not a text: {source!r}; write pydoc, file:path, s3://bucket/key or hf:organization/name")
        return source

    def __str__(self) -> str:
        return self.source


VARIANT_NAME = re.compile(
    r"(?P<format>[a-z][a-z0-9]*):(?P<type>[A-Za-z0-9][A-Za-z0-9_.-]*)(?:@(?P<label>[a-z0-9][a-z0-9-]*))?"
)


class Variant(Value):
    """One file or folder that is wanted.

    Attributes:
        format: a name in the table of formats, such as ``gguf``.
        type: the quantization type by the name that the format's users type, such as ``Q4_K_M``.
        label: names a set of options; empty for the plain type.
        options: the format's own options for this variant.
        required: whether a failed verdict fails the release.
        gates: bounds that replace the recipe's for this variant; None takes a gate away.
    """

    format: str
    type: str
    label: str = ""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    required: bool = True
    gates: dict[str, Bound | None] = Field(default_factory=dict)

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read ``format:type[@label]``; the inverse of `name`.

        Raises:
            ValueError: if the text has another form.
        """
        return cls.model_validate(cls.split(name))

    @staticmethod
    def split(name: str) -> dict[str, str]:
        """The parts of ``format:type[@label]`` by their field names.

        Raises:
            ValueError: if the text has another form.
        """
        match = VARIANT_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"not a variant: {name!r}; write format:type or format:type@label, such as gguf:Q4_K_M")
        return {part: value or "" for part, value in match.groupdict().items()}

    @property
    def name(self) -> str:
        """The text form, unique in a recipe."""
        return f"{self.format}:{self.type}" + (f"@{self.label}" if self.label else "")

    def __str__(self) -> str:
        return self.name

    @field_validator("gates")
    @classmethod
    def _gates_known(cls, gates: dict[str, Bound | None]) -> dict[str, Bound | None]:
        return _known_measures(gates)


def _known_measures(gates: dict[str, Bound | None]) -> dict[str, Bound | None]:
    for name in gates:
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r}{did_you_mean(name, MEASURES)}")
    return gates


class Evaluation(Value):
    """How quality is measured.

    Attributes:
        reference: ``source``: the checkpoint under PyTorch; ``base``: the unquantized base of each format.
        dtype: the arithmetic of the source under PyTorch.
        data: the evaluation text.
        window: tokens in a window, the beginning-of-sequence token included; its second half is scored.
        windows: how many windows, taken from the beginning of the text.
        top: how many of the most probable tokens the stored reference keeps for each position.
        sample: how many tokens it draws from the rest.
        seed: of that draw.
        prompts: what a chat model is asked; empty for a model without a chat template.
        answer_tokens: limit of an answer.
    """

    reference: Literal["source", "base"] = "source"
    dtype: Literal["float32", "bfloat16"] = "float32"
    data: DatasetRef = DatasetRef()
    window: int = Field(default=512, ge=8)
    windows: int = Field(default=12, ge=1)
    top: int = Field(default=256, ge=1)
    sample: int = Field(default=64, ge=1)
    seed: int = 0
    prompts: tuple[str, ...] = (
        "What is the capital of France?",
        "Name three primary colours.",
        "Write one sentence about the sea.",
    )
    answer_tokens: int = Field(default=64, ge=1)


class Benchmark(Value):
    """How speed and memory are measured.

    Attributes:
        threads: threads given to each tool; 0 for all cores of the machine.
        prompt_tokens: length of the prompt whose prefill is timed.
        generate_tokens: how many tokens are decoded.
        trials: runs per variant, interleaved over the variants.
        context: tokens of context for which memory is estimated.
    """

    threads: int = Field(default=0, ge=0)
    prompt_tokens: int = Field(default=256, ge=1)
    generate_tokens: int = Field(default=64, ge=1)
    trials: int = Field(default=3, ge=1)
    context: int = Field(default=2048, ge=1)


class Recipe(Value):
    """Everything that is wanted of one model.

    Attributes:
        schema_version: version of the recipe's layout.
        name: what the recipe is called; MLflow's experiment and the report bear it.
        description: one or two sentences for the people who choose it.
        source: where the checkpoint comes from.
        quantized_source: whether a source that was itself quantized is taken.
        repository_code: whether a source that brings code of its own (``auto_map``) is taken; the code is
            neither fetched nor run in either case.
        licenses: the licences allowed, as SPDX identifiers in lower case; empty for any.
        base: options of the unquantized base by format.
        variants: what is to be made.
        evaluation: how quality is measured.
        calibration: the text for methods that need one.
        gates: bounds that replace or extend the defaults; None takes a default away.
        benchmark: how speed and memory are measured; None leaves it out.
    """

    schema_version: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    description: str = ""
    source: ModelRef
    quantized_source: Literal["refuse", "accept"] = "refuse"
    repository_code: Literal["refuse", "ignore"] = "refuse"
    licenses: tuple[str, ...] = ()
    base: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    variants: tuple[Variant, ...] = Field(min_length=1)
    evaluation: Evaluation = Evaluation()
    calibration: DatasetRef | None = None
    gates: dict[str, Bound | None] = Field(default_factory=dict)
    benchmark: Benchmark | None = Benchmark()

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    @field_validator("source", mode="before")
    @classmethod
    def _source_from_text(cls, source: object) -> object:
        return ModelRef.parse(source) if isinstance(source, str) else source

    @field_validator("variants", mode="before")
    @classmethod
    def _variants_from_text(cls, variants: object) -> object:
        if not isinstance(variants, list | tuple):
            return variants
        return [_variant_from_yaml(variant) for variant in variants]

    @field_validator("gates")
    @classmethod
    def _gates_known(cls, gates: dict[str, Bound | None]) -> dict[str, Bound | None]:
        return _known_measures(gates)

    @model_validator(mode="after")
    def _names_unique(self) -> Self:
        names = [variant.name for variant in self.variants]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"named twice: {', '.join(doubled)}; give one of them a label, such as {doubled[0]}@other")
        return self

    @property
    def digest(self) -> str:
        """The digest of the recipe's canonical JSON."""
        return digest_of_bytes(canonical_json(self.model_dump(mode="json")))

    def formats(self) -> tuple[str, ...]:
        """The formats that its variants ask for, each once, in their order."""
        return tuple(dict.fromkeys(variant.format for variant in self.variants))

    def variant(self, name: str) -> Variant:
        """The variant of that name.

        Raises:
            KeyError: if the recipe has none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(name)

    def gates_of(self, variant: Variant) -> dict[str, Bound]:
        """The gates a variant must pass: the defaults, the recipe's over them, the variant's over those."""
        defaults = dict(DEFAULT_GATES)
        if self.evaluation.reference == "base":
            # Nothing is compared with the source then, so what conversion lost cannot be known.
            del defaults["conversion_kl"]
        merged = {**defaults, **self.gates, **variant.gates}
        return {name: bound for name, bound in merged.items() if bound is not None}


def _variant_from_yaml(variant: object) -> object:
    """A variant is written as its name, or as a mapping with its name under ``variant``."""
    if isinstance(variant, str):
        return Variant.split(variant)
    if isinstance(variant, dict) and isinstance(variant.get("variant"), str):
        rest = {key: value for key, value in variant.items() if key != "variant"}
        return {**Variant.split(variant["variant"]), **rest}
    return variant
