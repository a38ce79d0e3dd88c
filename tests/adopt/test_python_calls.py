"""What an adopted network costs in Python, by exact counts."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
import torchvision

import efficient_densenet
from efficient_densenet import make_efficient

SOURCE = str(Path(efficient_densenet.__file__).parent)


def test_calls_of_this_library_in_one_forward_pass():
    model, x = make_efficient(torchvision.models.densenet121()), torch.randn(1, 3, 64, 64)
    model(x)
    calls: Counter[str] = Counter()

    def count(frame, event, _argument):
        if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
            calls[frame.f_code.co_filename[len(SOURCE) + 1 :]] += 1

    sys.setprofile(count)
    try:
        model(x)
    finally:
        sys.setprofile(None)
    assert sum(calls.values()) <= 3000, calls.most_common(10)
    assert sum(n for name, n in calls.items() if name.startswith("adopt")) <= 200


def test_a_large_network_is_made_efficient_without_a_copy_of_its_weights():
    """What is allocated is a few random values and what a few pixels need: less than the weights are."""
    model = torchvision.models.DenseNet(48, (6, 12, 64, 48), 96)
    bytes_of_weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        make_efficient(model)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert most < bytes_of_weights
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
