"""What FlashInfer offers and what SGLang calls, read from their sources.

The trees are parsed (`ast`), never imported. An index is keyed by its checkout's revision and
cached in the workspace; a damaged cache is rebuilt.
"""

from __future__ import annotations

from tasks.discover.flashinfer_index import Api, FlashInferIndex, Template, index_flashinfer
from tasks.discover.index_cache import cached, revision
from tasks.discover.server_flags import ServerFlag
from tasks.discover.sglang_index import SglangIndex, Site, index_sglang

__all__ = [
    "Api",
    "FlashInferIndex",
    "ServerFlag",
    "SglangIndex",
    "Site",
    "Template",
    "cached",
    "index_flashinfer",
    "index_sglang",
    "revision",
]
