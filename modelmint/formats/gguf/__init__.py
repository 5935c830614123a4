"""GGUF, the format of llama.cpp: `format` offers the protocol, and what runs in child processes imports less."""
