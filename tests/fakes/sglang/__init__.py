"""A stand-in for SGLang 0.5.17: its command line, log, processes and HTTP API, without a GPU.

Put `tests/fakes` on a server's PYTHONPATH. What its scheduler calls are FlashInfer's own decorated
functions, with the arguments that SGLang passes; on a CPU each raises after its inputs were dumped.
Variables of the environment, none of which SGLang knows:

* `FAKE_SGLANG_FAULT`: what goes wrong, several by comma (`srt/faults.py`);
* `FAKE_SGLANG_ONCE`: a file; nothing goes wrong where it exists, and the first fault makes it
  (failing requests do not);
* `FAKE_SGLANG_SERVED`: a file that every request is written to, a JSON line each;
* `FAKE_SGLANG_STEPS`: a file that every step is written to once its kernels were called, a JSON
  line each: phase, and of each request the tokens cached before it, its length and its slots.
"""

from sglang.srt.entrypoints.engine import Engine as Engine
from sglang.version import __version__ as __version__
