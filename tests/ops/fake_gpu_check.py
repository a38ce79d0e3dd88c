"""In place of the child process that checks the kernels on a GPU, for `test_triton_trust`: it does as it is told.

It imports nothing that takes time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

behaviour, log, ready, device, kind = sys.argv[1:]
with Path(log).open("a") as file:
    print(device, kind, os.environ["EFFICIENT_DENSENET_GPU"], file=file)
if behaviour == "fails before the first kernel":
    raise SystemExit("CUDA-capable devices are busy")
print(ready, flush=True)
if behaviour == "dies":
    os.kill(os.getpid(), signal.SIGSEGV)
if behaviour == "hangs":
    time.sleep(60)
if behaviour == "raises":
    raise SystemExit("an illegal memory access was encountered")
if behaviour == "prints no verdict":
    print("all fine")
else:
    faults = {"wrong": ["finish: off by 3", "statistics: off by 1"], "right": []}
    print(json.dumps({"faults": faults[behaviour]} if behaviour in faults else {"undecided": behaviour}))
