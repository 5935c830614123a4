"""What is learned about a checkpoint from its small files and the headers of its weights, without loading it."""

from typing import Literal

from pydantic import ConfigDict, Field

from modelmint.formats import TensorShape
from modelmint.report import Value

SizeClass = Literal["below micro", "micro", "small", "medium", "large"]


def size_class(parameters: int) -> SizeClass:
    """The class of a model by its number of weights: micro 0.1 to 1.4 billion, small to 13.9, medium 14 to 30."""
    billions = parameters / 1e9
    if billions < 0.1:
        return "below micro"
    if billions < 1.45:
        return "micro"
    if billions < 13.95:
        return "small"
    return "medium" if billions < 30.5 else "large"


class Inspection(Value):
    """A checkpoint as it declares itself. A function of its files alone, but for `source` and `revision`.

    Attributes:
        schema_version: version of this document's layout.
        source: the pinned text form of where it came from; empty in the stored document.
        revision: commit or digest; empty in the stored document.
        architecture: the class that its configuration names.
        model_type: the family that its configuration names.
        parameters: number of weights, tied embeddings counted once.
        dtypes: number of weights by their type.
        license: in lower case, as the card names it or the licence's text shows; empty if neither says.
        context_length: tokens; 0 where unknown.
        chat_template: whether there is one.
        tokenizer: its kind, such as ``BPE``; empty where unknown.
        tokens: number of tokens that the tokenizer knows; 0 where unknown.
        vocabulary: number of token ids that the model tells apart: rows of its embedding; 0 where unknown.
        weight_bytes: of all tensors.
        size: of all files, in bytes.
        cache_bytes_per_token: of the key-value cache in float16; 0 where unknown.
        tensors: every tensor with shape and type.
        quantized_source: a sentence that says why the weights are not the original ones; empty if nothing says so.
        repository_code: the code that the repository wants to run on loading; empty if none. It is never run.
        notes: sentences worth repeating.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    source: str = ""
    revision: str = ""
    architecture: str
    model_type: str = ""
    parameters: int = Field(ge=0)
    dtypes: dict[str, int]
    license: str = ""
    context_length: int = Field(default=0, ge=0)
    chat_template: bool = False
    tokenizer: str = ""
    tokens: int = Field(default=0, ge=0)
    vocabulary: int = Field(default=0, ge=0)
    weight_bytes: int = Field(ge=0)
    size: int = Field(ge=0)
    cache_bytes_per_token: int = Field(default=0, ge=0)
    tensors: tuple[TensorShape, ...] = ()
    quantized_source: str = ""
    repository_code: str = ""
    notes: tuple[str, ...] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    @property
    def size_class(self) -> SizeClass:
        """The class of the model by its number of weights."""
        return size_class(self.parameters)

    def memory_bytes(self, context: int) -> int:
        """Estimated memory of the unquantized model with a cache for that many tokens: weights and key-value cache."""
        return self.weight_bytes + context * self.cache_bytes_per_token
