"""The types of GGUF: what llama-quantize can be asked for, and what the tensors of a file are made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorType:
    """How the numbers of one tensor are stored.

    Attributes:
        id: its number in files.
        name: as llama.cpp prints it, such as ``q4_K``.
        block: how many numbers of a row are stored together; a row is a whole number of blocks.
        size: bytes of a block.
        needs_imatrix: whether llama.cpp refuses to make it without an importance matrix.
    """

    id: int
    name: str
    block: int
    size: int
    needs_imatrix: bool = False

    @property
    def quantized(self) -> bool:
        """Whether it stores less than each number for itself."""
        return self.block > 1

    def bytes_of(self, width: int, elements: int) -> int:
        """Bytes of `elements` numbers in rows of `width`, which is a multiple of the block."""
        return elements // width * (width // self.block * self.size)


_TENSOR_TYPES = (
    TensorType(0, "f32", 1, 4),
    TensorType(1, "f16", 1, 2),
    TensorType(2, "q4_0", 32, 18),
    TensorType(3, "q4_1", 32, 20),
    TensorType(6, "q5_0", 32, 22),
    TensorType(7, "q5_1", 32, 24),
    TensorType(8, "q8_0", 32, 34),
    TensorType(10, "q2_K", 256, 84),
    TensorType(11, "q3_K", 256, 110),
    TensorType(12, "q4_K", 256, 144),
    TensorType(13, "q5_K", 256, 176),
    TensorType(14, "q6_K", 256, 210),
    TensorType(16, "iq2_xxs", 256, 66, needs_imatrix=True),
    TensorType(17, "iq2_xs", 256, 74, needs_imatrix=True),
    TensorType(18, "iq3_xxs", 256, 98, needs_imatrix=True),
    TensorType(19, "iq1_s", 256, 50, needs_imatrix=True),
    TensorType(20, "iq4_nl", 32, 18),
    TensorType(21, "iq3_s", 256, 110),
    TensorType(22, "iq2_s", 256, 82, needs_imatrix=True),
    TensorType(23, "iq4_xs", 256, 136),
    TensorType(24, "i8", 1, 1),
    TensorType(25, "i16", 1, 2),
    TensorType(26, "i32", 1, 4),
    TensorType(27, "i64", 1, 8),
    TensorType(28, "f64", 1, 8),
    TensorType(29, "iq1_m", 256, 56, needs_imatrix=True),
    TensorType(30, "bf16", 1, 2),
    TensorType(34, "tq1_0", 256, 54),
    TensorType(35, "tq2_0", 256, 66),
    TensorType(39, "mxfp4", 32, 17),
    TensorType(40, "nvfp4", 64, 36),
    TensorType(41, "q1_0", 128, 18),
    TensorType(42, "q2_0", 64, 18),
)
TENSOR_TYPES = {kind.name: kind for kind in _TENSOR_TYPES}
"""Every type of a stored tensor, by name."""
TENSOR_TYPES_BY_ID = {kind.id: kind for kind in _TENSOR_TYPES}

INTEGER_TYPES = frozenset(("i8", "i16", "i32", "i64"))
"""Types that hold no weights."""


@dataclass(frozen=True)
class FileType:
    """One quantization type of a file: a mixture of tensor types under one name.

    Attributes:
        name: as llama-quantize spells it.
        id: llama.cpp's ``llama_ftype``.
        tensors: the type of most of its tensors.
        bits: nominal bits per weight: those of `tensors`, a little more where the mixture is richer.
        summary: one line for lists and forms.
        needs_imatrix: whether llama.cpp refuses to make it without an importance matrix, at usual row widths.
    """

    name: str
    id: int
    tensors: str
    bits: float
    summary: str
    needs_imatrix: bool = False


COPY = "COPY"

_FILE_TYPES = (
    FileType("F32", 0, "f32", 32, "every weight in 32 bits"),
    FileType("F16", 1, "f16", 16, "16-bit floats, five bits of exponent"),
    FileType("BF16", 32, "bf16", 16, "16-bit floats with the range of 32-bit ones"),
    FileType(COPY, 0, "f16", 16, "the base's tensors as they are"),
    FileType("Q8_0", 7, "q8_0", 8.5, "8 bits in blocks of 32: nearly lossless"),
    FileType("Q6_K", 18, "q6_K", 6.56, "6 bits in blocks of 256: very close to the base"),
    FileType("Q5_K_M", 17, "q5_K", 5.7, "5 bits, sensitive tensors in 6: low loss"),
    FileType("Q5_K_S", 16, "q5_K", 5.5, "5 bits in blocks of 256"),
    FileType("Q5_1", 9, "q5_1", 6, "5 bits in blocks of 32, with minimum"),
    FileType("Q5_0", 8, "q5_0", 5.5, "5 bits in blocks of 32"),
    FileType("Q4_K_M", 15, "q4_K", 4.85, "4 bits, sensitive tensors in 6: the usual choice"),
    FileType("Q4_K_S", 14, "q4_K", 4.6, "4 bits in blocks of 256, a few tensors in 5"),
    FileType("Q4_1", 3, "q4_1", 5, "4 bits in blocks of 32, with minimum"),
    FileType("Q4_0", 2, "q4_0", 4.5, "4 bits in blocks of 32: fast on CPUs"),
    FileType("IQ4_NL", 25, "iq4_nl", 4.5, "4 bits on a non-linear grid, blocks of 32"),
    FileType("IQ4_XS", 30, "iq4_xs", 4.25, "4 bits on a non-linear grid, blocks of 256"),
    FileType("MXFP4_MOE", 38, "mxfp4", 4.25, "experts in MXFP4, the rest in 8 bits; for mixture-of-experts models"),
    FileType("Q3_K_L", 13, "q3_K", 4.25, "3 bits, sensitive tensors in 5"),
    FileType("Q3_K_M", 12, "q3_K", 3.9, "3 bits, sensitive tensors in 4 and 5"),
    FileType("Q3_K_S", 11, "q3_K", 3.45, "3 bits in blocks of 256"),
    FileType("IQ3_M", 27, "iq3_s", 3.66, "3 bits on a lattice, sensitive tensors in 4"),
    FileType("IQ3_S", 26, "iq3_s", 3.44, "3 bits on a lattice"),
    FileType("IQ3_XS", 22, "iq3_s", 3.3, "3 bits on a lattice, a coarser one in the middle layers", needs_imatrix=True),
    FileType("IQ3_XXS", 23, "iq3_xxs", 3.06, "3 bits on a coarse lattice", needs_imatrix=True),
    FileType("Q2_K", 10, "q2_K", 3, "2 bits, many tensors in 3: high loss"),
    FileType("Q2_K_S", 21, "q2_K", 2.8, "2 bits in blocks of 256", needs_imatrix=True),
    FileType("Q2_0", 41, "q2_0", 2.25, "2 bits in blocks of 64; for models trained for it"),
    FileType("IQ2_M", 29, "iq2_s", 2.7, "2 bits on a lattice, sensitive tensors in 3", needs_imatrix=True),
    FileType("IQ2_S", 28, "iq2_xs", 2.5, "2 bits on a lattice, sensitive tensors in 3", needs_imatrix=True),
    FileType("IQ2_XS", 20, "iq2_xs", 2.31, "2 bits on a lattice", needs_imatrix=True),
    FileType("IQ2_XXS", 19, "iq2_xxs", 2.06, "2 bits on a coarse lattice", needs_imatrix=True),
    FileType("TQ2_0", 37, "tq2_0", 2.06, "ternary weights; for models trained for it"),
    FileType("TQ1_0", 36, "tq1_0", 1.69, "ternary weights, packed tighter; for models trained for it"),
    FileType("IQ1_M", 31, "iq1_m", 1.75, "less than 2 bits", needs_imatrix=True),
    FileType("IQ1_S", 24, "iq1_s", 1.56, "about 1.5 bits", needs_imatrix=True),
    FileType("Q1_0", 40, "q1_0", 1.125, "1 bit in blocks of 128; for models trained for it"),
)
FILE_TYPES = {kind.name: kind for kind in _FILE_TYPES}
"""Every quantization type that llama-quantize offers, by its name there; aliases left out."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Second names that llama-quantize takes; one file gets one name here."""
