"""What of our environment a server is given, and its keeper."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SECRET = re.compile(
    r"SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL|PRIVATE|(?:^|_)(?:TOKEN|AUTH|KEY)(?:_|$)"
)


_PASSED_ON = (
    "ALL_PROXY",
    "CPATH",
    "CURL_CA_BUNDLE",
    "HOME",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "LANG",
    "LC_ALL",
    "LIBRARY_PATH",
    "MAX_JOBS",
    "NO_PROXY",
    "PATH",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONPATH",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE",
    "USER",
)
_PREFIXES_PASSED_ON = (
    "CUDA_",
    "FLASHINFER_",
    "GLOO_",
    "HF_",
    "LD_",
    "NCCL_",
    "NVIDIA_",
    "SGLANG_",
    "TORCH",
    "TRITON_",
    "XDG_",
)
_NOT_PASSED_ON = ("FLASHINFER_DUMP", "FLASHINFER_LOG")


def may_be_secret(variable: str) -> bool:
    """Whether an environment variable's name says that its value is nobody's business."""
    return _SECRET.search(variable.upper()) is not None


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a server and its keeper are given of our environment: nothing secret."""
    return {
        name: value
        for name, value in environment.items()
        if (name.upper() in _PASSED_ON or name.startswith(_PREFIXES_PASSED_ON))
        and not name.startswith(_NOT_PASSED_ON)
        and not may_be_secret(name)
    }
