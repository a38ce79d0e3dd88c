"""The CPU in a GPU's place, to try programs for a GPU where there is none.

Memory, streams and graphs are made up: what is tried is that the programs run, and write down what they should.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

from efficient_densenet.measure import processes
from efficient_densenet.measure.devices import Place


class InPlaceOfAGpu(TorchFunctionMode):
    """Whatever is said to be on a GPU is on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: _elsewhere(value) for name, value in (kwargs or {}).items()}
        return function(*(_elsewhere(value) for value in args), **kwargs)


def _elsewhere(value):
    on_gpu = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
    return "cpu" if on_gpu and isinstance(value, str) else torch.device("cpu") if on_gpu else value


class Event:
    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@contextmanager
def nothing(*arguments):
    yield


class Team:
    """In place of `processes.Team`: the worker is a module in this process, for processes take seconds to start."""

    def __init__(self, module, job, device_type):
        with InPlaceOfAGpu():  # in each thread
            self.operations = importlib.import_module(module).start(job, Place(device_type))

    def ask(self, request):
        with InPlaceOfAGpu():
            return [json.loads(json.dumps(self.operations[request]()))]

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def install():
    """For a whole process, with Triton's interpreter: ``TRITON_INTERPRET=1``. With ``ONE_PROCESS=1`` there is one."""
    import triton.testing
    from triton_interpreter import without_repetition  # which imports this module

    without_repetition()
    properties = SimpleNamespace(name="stand-in", major=9, minor=0, multi_processor_count=1, total_memory=10**9)
    instead = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": nothing,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (10**9, 10**9),
        "max_memory_allocated": lambda device=None: 10**6,
        "max_memory_reserved": lambda device=None: 10**6,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
        "Event": Event,
        "Stream": Stream,
        "stream": nothing,
        "current_stream": Stream,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": nothing,
    }
    for name, function in instead.items():
        setattr(torch.cuda, name, function)
    torch.compile = lambda network, **options: network
    sys.modules["torch._inductor.compile_fx"] = None  # importing it would take longer than all that is tried
    triton.testing.do_bench = lambda attempt, **options: (attempt(), 1.0)[1]
    if os.environ.get("ONE_PROCESS"):
        processes.Team = Team
    InPlaceOfAGpu().__enter__()
