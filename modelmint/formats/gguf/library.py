"""llama.cpp's C functions and what it prints, without the rest of the Python package around them.

The package's own ``__init__`` imports its high-level interface, and with it numpy and a web of helpers: tens of
megabytes that would count as the quantizer's memory. The module of plain declarations needs nothing but ctypes.
"""

import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from modelmint.errors import UnsupportedError

INSTALL = "run `make install`, which builds llama.cpp's binding and installs the converter that belongs to it"

_CONTINUED = 5
ERROR_LEVEL = 4
INFO_LEVEL = 2


@cache
def load() -> ModuleType:
    """The module of declarations, ``llama_cpp.llama_cpp``; its library is loaded and initialized.

    Raises:
        UnsupportedError: if the package is not installed.
    """
    if "llama_cpp" not in sys.modules:
        package = ModuleType("llama_cpp")
        package.__path__ = [str(package_folder())]
        sys.modules["llama_cpp"] = package
    library = importlib.import_module("llama_cpp.llama_cpp")
    library.llama_backend_init()
    return library


def package_folder() -> Path:
    """The folder of the installed package.

    Raises:
        UnsupportedError: if it is not installed.
    """
    module = sys.modules.get("llama_cpp")
    if module is not None:
        return Path(next(iter(module.__path__)))
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError(f"the package llama-cpp-python is not installed; {INSTALL}")
    return Path(spec.submodule_search_locations[0])


@cache
def tensor_library() -> ctypes.CDLL:
    """The library of ggml, for what the package does not declare."""
    load()
    library = ctypes.CDLL(str(package_folder() / "lib" / "libggml-base.so"))
    library.ggml_validate_row_data.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library


class Log:
    """Takes over what llama.cpp prints, for as long as the process lives.

    Args:
        level: the least level that is kept: 1 debug, 2 info, 3 warning, 4 error.
        on_text: told each piece as it comes, of any level.
    """

    _current: "Log | None" = None

    def __init__(self, level: int = ERROR_LEVEL, on_text: Callable[[str], None] | None = None) -> None:
        self._level = level
        self._on_text = on_text
        self._last_level = 0
        self._pieces: list[str] = []
        library = load()
        self._callback = library.llama_log_callback(self._take)
        library.llama_log_set(self._callback, None)
        # The library keeps the pointer, so the function behind it must outlive every local name.
        Log._current = self

    def _take(self, level: int, text: bytes, _data: Any) -> None:
        if level == _CONTINUED:
            level = self._last_level
        self._last_level = level
        decoded = text.decode(errors="replace")
        if level >= self._level:
            self._pieces.append(decoded)
        if self._on_text is not None:
            self._on_text(decoded)

    @property
    def text(self) -> str:
        """All that was kept, in order."""
        return "".join(self._pieces)

    @property
    def reason(self) -> str:
        """The lines that were kept as one sentence, for the end of an error message."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return "; ".join(lines[-4:]) if lines else "it does not say why"
