"""Exported models with what comes before and behind the network inside."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

from efficient_densenet import DenseNet
from efficient_densenet.cli import main

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    network = DenseNet(num_init_features=8, growth_rate=4, block_config=(1, 1), num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    return network


def export(folder, name, *options):
    return main(["export", "--checkpoint", str(folder / "weights.pth"), "--output", str(folder / name), *options])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_program_normalises_and_ends_with_probabilities(tmp_path, network, capsys):
    assert export(tmp_path, "a.pt2", "--size", "24,40", "--normalize", "--probabilities") == 0
    assert "dynamic × 3 × 24 × 40 images to probabilities of 3 classes" in capsys.readouterr().out
    images = torch.rand(5, 3, 24, 40)
    found = torch.export.load(tmp_path / "a.pt2").module()(images)
    torch.testing.assert_close(found, network((images - MEAN) / STD).softmax(1))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_onnx_in_half_precision(tmp_path, network):
    assert export(tmp_path, "a.onnx", "--size", "16", "--half", "--batch-size", "2") == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()
    assert (wanted.type, wanted.shape) == ("tensor(float16)", [2, 3, 16, 16])
    images = torch.randn(2, 3, 16, 16)
    (found,) = session.run(None, {"images": images.half().numpy()})
    torch.testing.assert_close(torch.from_numpy(found).float(), network(images), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("size", ["0", "8,8,8", "x"])
def test_a_size_that_is_none(tmp_path, network, capsys, size):
    with pytest.raises(SystemExit) as end:
        export(tmp_path, "a.pt2", "--size", size)
    assert end.value.code == 2
    assert "must be a number of pixels" in capsys.readouterr().err


def test_images_that_are_too_small_for_the_network(tmp_path, network, capsys):
    assert export(tmp_path, "a.pt2", "--size", "1") == 2
    assert "too small for this network" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]
