"""Every block type of ggml that codes can be written to, by its number."""

from __future__ import annotations

from collections.abc import Mapping

from adaptmerge.schemes.gguf.blocks import Bytes, Codec, Fives, Mxfp4, Nibbles, Table
from adaptmerge.schemes.gguf.super_blocks import SUPER_BLOCKS

FOURS = (Nibbles(2), Nibbles(3), Table(20), Mxfp4(39))
CODECS: Mapping[int, Codec] = {
    codec.type: codec for codec in (*FOURS, Fives(6), Fives(7), Bytes(8), *SUPER_BLOCKS)
}
