"""Thousands of damaged files, each read or refused in one sentence: ``pytest tests/weights --damaged-files 200000``."""

from __future__ import annotations

import gc
import io
import os
import pickle
import random
import re
import struct
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from efficient_densenet.checkpoints import read_densenet
from efficient_densenet.errors import UserError
from efficient_densenet.models import DenseNet
from efficient_densenet.weights.canonical import read_weights

FORBIDDEN = ("os.", "subprocess.", "shutil.", "socket.", "exec", "compile", "pickle.find_class", "ctypes.")
events: list[str] | None = None


def note(event, arguments):
    if events is None or (event == "exec" and "/encodings/" in arguments[0].co_filename):  # Python imports a codec
        return
    if event == "os.listdir" and sys._getframe(1).f_code.co_filename.startswith(
        "<frozen importlib"
    ):  # and looks for it
        return
    if event.startswith(FORBIDDEN) or (event == "open" and "w" in str(arguments[1])):
        events.append(event)


sys.addaudithook(note)  # which cannot be taken back; it notes nothing while `events` is None


def resident(what):
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM)."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def start_of_peak():
    """Bytes in memory now; the peak is counted from here on."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def savez(arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def sources():
    """A small file of each format."""
    state = DenseNet(num_init_features=4, growth_rate=2, block_config=(1, 1), num_classes=2).state_dict()
    content = {
        "state_dict": OrderedDict(state),
        "log": defaultdict(list, a=[1.5, None, True]),
        "module": torch.nn.ReLU(),
    }
    return [
        saved(content),
        saved(content, pickle_protocol=4),
        saved(content, _use_new_zipfile_serialization=False),
        save(state),
        savez({name: tensor.numpy() for name, tensor in state.items()}),
        pickle.dumps({name: tensor.numpy() for name, tensor in state.items()}),
    ]


def damaged(data, generator):
    data = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 5))):
        start = generator.randrange(len(data) + 1)
        length = generator.choice((1, 1, 2, 4, 8, 30))
        match generator.randrange(6):
            case 0:
                data[start : start + length] = generator.randbytes(length)
            case 1:
                data[start : start + 1] = bytes(
                    [data[start] ^ 1 << generator.randrange(8)] if start < len(data) else []
                )
            case 2:
                data[start : start + length] = b"\xff" * length
            case 3:
                del data[start : start + length]
            case 4:
                data[start:start] = data[:length]
            case 5:
                del data[start:]
    return bytes(data)


def with_damaged_pickle(data, generator):
    """The archive with right checksums, so that the damage gets to what parses the pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for record in old.infolist():
            content = old.read(record)
            new.writestr(record.filename, damaged(content, generator) if record.filename.endswith(".pkl") else content)
    return buffer.getvalue()


def test_damaged_files_are_read_or_refused_in_one_sentence(tmp_path, request):
    global events
    generator, path = random.Random(5), tmp_path / "a.pth"
    files = sources()
    read = 0
    for source in files:  # what is imported at the first use
        path.write_bytes(source)
        read_weights(path).load()
    before = start_of_peak()
    for number in range(request.config.getoption("--damaged-files")):
        source = files[number % len(files)]
        zipped = source.startswith(b"PK") and generator.random() < 0.7
        path.write_bytes(with_damaged_pickle(source, generator) if zipped else damaged(source, generator))
        events = []
        try:
            read_weights(path).load()
            read += 1
        except UserError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            assert len(str(error)) < 800
        finally:
            happened, events = events, None
        assert happened == []
    assert os.listdir(tmp_path) == ["a.pth"]
    assert 0 < read < number  # it may lie among the numbers of a tensor, or in padding
    assert resident("VmHWM") - before < 2**27


class Harmful:
    """Unpickling it creates the folder `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(tmp_path, zipped):
    harmful = Harmful(tmp_path / "harm")
    state = DenseNet(num_init_features=4, block_config=(1,)).state_dict()
    content = {"state_dict": state, "args": harmful, **{f"features.{i}": harmful for i in range(3)}}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    weights = read_weights(tmp_path / "a.pth")
    assert torch.equal(weights.load()["features.conv0.weight"], state["features.conv0.weight"])
    torch.save(state | {"features.conv0.weight": harmful}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"features.conv0.weight is not an ordinary tensor but a posix.mkdir"):
        read_weights(tmp_path / "a.pth")
    assert os.listdir(tmp_path) == ["a.pth"]
    pickle.loads(pickle.dumps(content))
    assert len(os.listdir(tmp_path)) == 2  # what would have happened


def test_every_flipped_bit_in_the_numbers_of_an_archive_is_found(tmp_path):
    state = DenseNet(num_init_features=4, growth_rate=2, block_config=(1,), num_classes=2).state_dict()
    data, path = saved(state), tmp_path / "a.pth"
    start = data.index(state["features.conv0.weight"].numpy().tobytes())
    for bit in range(0, 8 * state["features.conv0.weight"].nbytes, 41):
        flipped = bytearray(data)
        flipped[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"damaged.*CRC"):
            read_weights(path).load()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    state = DenseNet(num_init_features=4, block_config=(1,)).state_dict()
    state["features.norm2.running_var"][3] = value
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"infinite or not a number: features.norm2.running_var;.*--allow-non-finite"):
        read_weights(tmp_path / "a.pth").load()
    loaded = read_weights(tmp_path / "a.pth").load(allow_non_finite=True)
    assert torch.equal(loaded["features.norm2.running_var"].isfinite(), state["features.norm2.running_var"].isfinite())


NO_DENSE_TENSORS = {
    "sparse": lambda t: t.to_sparse(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "meta": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[1, :1]]),
}


@pytest.mark.parametrize("kind", NO_DENSE_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_a_number_for_each_element_are_refused(tmp_path, kind):
    state = DenseNet(num_init_features=4, block_config=(1,)).state_dict()
    state["features.conv0.weight"] = NO_DENSE_TENSORS[kind](state["features.conv0.weight"])
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"features.conv0.weight is not an ordinary tensor but a torch._utils"):
        read_weights(tmp_path / "a.pth")


def pickled_tensor(size, stride, numel=4, key=b"0"):
    """Instructions for ``{"features.denseblock1.denselayer1.conv1.weight": tensor}`` with a storage of four numbers."""

    def number(value):
        return b"\x8a" + bytes([9]) + value.to_bytes(9, "little", signed=True)

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + key + b"X\x03\0\0\0cpu" + number(numel) + b"tQ"
    shape = [b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (size, stride)]
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape[0] + shape[1] + b"\x89NtR"
    name = b"features.denseblock1.denselayer1.conv1.weight"
    return b"\x80\x02}X" + struct.pack("<I", len(name)) + name + tensor + b"s."


def archive(pickled, storage=bytes(16), compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", storage)
    return buffer.getvalue()


class OfTheSameBytes:
    """Pickled as an array of one number, which says that all these bytes are its memory."""

    data = bytes(2**23)

    def __reduce__(self):
        function, arguments, (version, shape, dtype, by_columns, _) = np.zeros(1).__reduce__()
        return function, arguments, (version, shape, dtype, by_columns, self.data)


HOSTILE = {
    "arrays of the same bytes": pickle.dumps(
        {f"features.denseblock1.denselayer{i}.conv1.weight": OfTheSameBytes() for i in range(1, 61)}
    ),
    "size": archive(pickled_tensor((2**40,), (1,))),
    "stride": archive(pickled_tensor((4,), (2**40,))),
    "negative stride": archive(pickled_tensor((4,), (-1,))),
    "expanded": archive(pickled_tensor((2**40,), (0,))),
    "overflow": archive(pickled_tensor((2**62, 2**62), (4, 4))),
    "dimensions": archive(pickled_tensor((1,) * 1000, (1,) * 1000)),
    "storage": archive(pickled_tensor((2**30,), (1,), numel=2**30)),
    "deflated": archive(pickled_tensor((2**25,), (1,), numel=2**25), bytes(2**27), zipfile.ZIP_DEFLATED),
    "deflated pickle": archive(b"\x80\x02X" + struct.pack("<I", 2**27) + bytes(2**27), b"", zipfile.ZIP_DEFLATED),
    "no such record": archive(pickled_tensor((4,), (1,), key=b"1")),
    "many values": archive(b"\x80\x02(" + b"]" * 2**22 + b"l."),
    "copies of a list": archive(
        b"\x80\x02](" + b"K\0" * 2**17 + b"e\x85q\0c__builtin__\nset\nq\x01(" + b"h\x01h\0R" * 2**17 + b"l."
    ),
    "deep": archive(b"\x80\x02" + b"]" * 2**19 + b"a" * (2**19 - 1) + b"."),
    "doubled tuples": archive(b"\x80\x02)" + b"2\x86" * 2**16 + b"."),
    "doubled tuples as a key": archive(b"\x80\x02})" + b"2\x86" * 2**16 + b"Ns."),
    "long number": archive(b"\x80\x02L" + b"9" * 10**6 + b"L\n."),
    "large memo": archive(b"\x80\x02]r\xff\xff\xff\xff."),
    "announced bytes": archive(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a."),
    "long names": archive(b"\x80\x02}" + (b"X\x20\0\0\0" + b"a" * 32 + b"}") * 2**16 + b"s" * 2**16 + b"."),
    "end of the stack": archive(b"\x80\x02((0."),
    "class as a tensor": archive(pickled_tensor((4,), (1,)).replace(b"_rebuild_tensor_v2", b"_rebuild_from_type")),
}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_that_is_larger_than_the_file_is_refused_before_anything_is_made(tmp_path, bias):
    state = DenseNet(num_init_features=4, block_config=(1,)).state_dict()
    state["classifier.weight"] = torch.ones(1).expand(2**40, state["features.norm2.weight"].shape[0])
    if not bias:
        del state["classifier.bias"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="declares tensors that are larger than the whole file"):
        read_weights(tmp_path / "a.pth")


def test_a_last_norm_without_dimensions_is_refused(tmp_path):
    state = DenseNet(num_init_features=4, block_config=(1,)).state_dict()
    torch.save(state | {"features.norm2.weight": torch.tensor(1.0)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="of the wrong shape"):
        read_densenet(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_declared_costs_no_memory(tmp_path, kind):
    path = tmp_path / "a.pth"
    path.write_bytes(HOSTILE[kind])
    before = start_of_peak()
    with pytest.raises(UserError) as caught:
        read_weights(path).load()
    assert resident("VmHWM") - before < 16 * len(HOSTILE[kind]) + 2**27
    assert "\n" not in str(caught.value)
