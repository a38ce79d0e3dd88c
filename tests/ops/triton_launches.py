"""That a kernel is started the short way with what Triton itself would start it: run by `test_ops_triton`.

In a process of its own, for a driver that starts nothing takes the place of the real one: compilation is real, and what
reaches the driver is looked at.
"""

from __future__ import annotations

import itertools
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from efficient_densenet.ops.protocol import Affine, Statistics
from efficient_densenet.ops.triton import forward, launch, moments, norms, recording

started: list[tuple] = []


class Utils:
    functions = itertools.count()

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name, binary, shared, device):
        return object(), (name, next(self.functions)), 64, 0, 1024

    def unload_module(self, module):
        pass


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        started.append((x, y, z, stream, function, packed, enter, leave, *arguments))


class Driver:
    utils = Utils()
    launcher_cls = Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 17


def plain(value):
    """Tensors are the same where they lie in the same place."""
    return (value.data_ptr(), value.dtype) if isinstance(value, torch.Tensor) else value


def twice(operation):
    """What an operation starts, which must be the same three times: Triton's own way, compiled, and looked up."""

    def triton_s_own(kernel, programs, tile, *arguments):
        kernel[(programs,)](*arguments, **tile.sizes, **launch.options(tile))

    def starts():
        started.clear()
        operation()
        return list(started)

    launch._compiled.clear()
    with mock.patch.object(launch, "run", triton_s_own):
        expected = starts()
    first = starts()
    known = dict(launch._compiled)
    assert len(known) == len(expected)
    for found in (first, starts()):
        assert launch._compiled == known and len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert [plain(v) for v in ours] == [plain(v) for v in theirs]
    return [function for _, _, _, _, function, *_ in expected]


def recorded(given, operation):
    """A recording starts what the operation starts, on the same device addresses: now, and with other tensors."""
    made = recording.Recording(given)
    with launch.collected() as launches:
        operation(*given)
    made.add(launches)
    for tensors in (given, [t.clone() for t in given]):
        scratch = torch.empty(made._scratch, dtype=torch.uint8)
        started.clear()
        operation(*tensors)
        expected = [[address(v, tensors, None) for v in one] for one in started]
        started.clear()
        made._start_each([*(t.data_ptr() for t in tensors), scratch.data_ptr()], 17)
        assert [[address(v, tensors, scratch) for v in one] for one in started] == expected and expected


def address(value, given, scratch):
    """A pointer into one of the tensors given as its number and how far behind; any into scratch are the same.

    What points into neither is a number. No number here is as large as an address, which need not be large: where
    Python is loaded at a fixed place, its heap lies below 2³².
    """
    pointer = value.data_ptr() if isinstance(value, torch.Tensor) else value
    if not isinstance(pointer, int) or isinstance(value, bool):
        return value
    for number, t in enumerate(given):
        if t.data_ptr() <= pointer < t.data_ptr() + t.nbytes:
            return number, pointer - t.data_ptr()
    if scratch is None:  # an operation has scratch of its own
        return "scratch" if isinstance(value, torch.Tensor) else value
    return "scratch" if scratch.data_ptr() <= pointer < scratch.data_ptr() + scratch.nbytes else value


def main():
    triton.runtime.driver.set_active(Driver())
    vectors = torch.randn(7, 37)
    norm = Affine(*vectors[:4].clone())

    def fold(bias, eps=1e-5):
        return lambda: norms.fold_norm(Statistics(*vectors[:2]), vectors[4], bias, eps, norm)

    # Where vectors begin is nothing to the compiler, and does not make another kernel.
    far = torch.randn(38)[1:]
    assert len({*twice(fold(vectors[0])), *twice(fold(vectors[0].to(torch.bfloat16)))}) == 2
    assert twice(fold(vectors[0])) == twice(fold(far)) == twice(fold(far, eps=0))  # a whole number is no other type

    # The moments get another tensor each time; here they get the same one again.
    kept = {}
    moments.moments_of = lambda x, blocks: kept.setdefault(blocks, torch.empty(2, x.shape[-1], blocks))
    x, found = torch.randn(3, 5, 7, 16), Statistics(*torch.empty(2, 16))
    assert [name for name, _ in twice(lambda: moments.statistics(x, found))] == ["moments_kernel", "merge_kernel"]
    shifted = torch.randn(3 * 5 * 7 * 16 + 1)[1:].view(x.shape)  # not at a multiple of 16 bytes
    assert twice(lambda: moments.statistics(x, found))[0] != twice(lambda: moments.statistics(shifted, found))[0]
    of_x, weight, out = Affine(*torch.randn(4, 16)), torch.randn(8, 16, 1, 1), torch.empty(3, 5, 7, 8)
    operation = lambda: forward.norm_relu_conv(x, of_x, weight, out, 1, None)  # noqa: E731
    assert [name for name, _ in twice(operation)] == ["norm_relu_conv_kernel"]

    buffer, vectors = torch.randn(3, 5, 7, 32), torch.randn(6, 16)

    def layer(buffer, vectors, weight):  # reads a slice of the channels, writes another one, and takes scratch
        norm, found = Affine(*vectors[:4]), Statistics(*vectors[4:, 16 - len(weight) :])
        forward.norm_relu_conv(buffer[..., :16], norm, weight, buffer[..., 16 : 16 + len(weight)], 1, found)

    recorded([buffer, vectors, weight], layer)
    recorded([buffer, vectors, torch.randn(5, 16, 3, 3)], layer)
    print("the same")


if __name__ == "__main__":
    main()
