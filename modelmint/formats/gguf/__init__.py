"""GGUF, the format of llama.cpp. `format` offers the names of the protocol; what runs in child processes imports less."""
