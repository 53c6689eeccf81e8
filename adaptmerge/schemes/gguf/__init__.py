"""Model files of [llama.cpp](https://github.com/ggml-org/llama.cpp), whose weights are blocks of ggml."""

from adaptmerge.schemes.gguf.layout import SCHEME

__all__ = ["SCHEME"]
