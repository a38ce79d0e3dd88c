"""Every dialect is read and written: with the real libraries where they are installed, else with look-alikes.

The look-alikes rename with plain string operations, so that they share nothing with the tables under test.
"""

from __future__ import annotations

import pytest
import torch

from efficient_densenet.checkpoints import DIALECTS, convert_file, load_network, read_densenet, read_state_dict
from efficient_densenet.models import DenseNet, densenet121
from efficient_densenet.weights.dialects import from_canonical, to_canonical

SMALL = {"num_init_features": 6, "growth_rate": 4, "block_config": (2, 1), "compression": 0.5, "num_classes": 3}
NETWORKS = {
    "plain": SMALL,
    "bottleneck": SMALL | {"bn_size": 2},
    "large stem": SMALL | {"bn_size": 2, "input_size": 64},
    "four blocks": SMALL | {"bn_size": 2, "input_size": 64, "block_config": (1, 2, 1, 1)},
}


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Different values everywhere, so that no two tensors can be taken for each other."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(int(torch.randint(1, 1000, (), generator=generator)))
            elif tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
    return network.eval()


def state_of(**arguments) -> dict[str, torch.Tensor]:
    return randomised(DenseNet(**arguments)).state_dict()


def blocks_in(state) -> int:
    return len({name.split(".")[1] for name in state if "denseblock" in name})


def norm5(state):
    return {k.replace(f"features.norm{blocks_in(state) + 1}.", "features.norm5."): v for k, v in state.items()}


def old_torchvision(state):
    state = norm5({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")})
    for part in ("norm", "conv"):
        for i in "12":
            state = {
                k.replace(f".{part}{i}.", f".{part}.{i}.") if "denselayer" in k else k: v for k, v in state.items()
            }
    return state


def gpleiss(state):
    return {k.replace(f"features.norm{blocks_in(state) + 1}.", "features.norm_final."): v for k, v in state.items()}


def old_gpleiss(state):
    return {k.replace("features.norm5.", "features.norm_final."): v for k, v in old_torchvision(state).items()}


def monai(state):
    names = {k: ".".join(["class_layers.out", *k.split(".")[1:]]) for k in state if k.startswith("classifier.")}
    for k in state:
        parts = k.split(".")
        if "denselayer" in k:
            names[k] = ".".join([*parts[:3], "layers", *parts[3:]])
    return norm5({names.get(k, k): v for k, v in state.items()})


def wandering007(state):
    renamed = {}
    for k, v in state.items():
        old, new = (
            (".norm1.", ".bottleneck.norm_")
            if "denselayer" in k and ".norm1." in k
            else (".conv1.", ".bottleneck.conv_")
        )
        renamed[k.replace(old, new)] = v
    return renamed


def old_wandering007(state):
    return {k: v for k, v in wandering007(state).items() if not k.endswith("norm_num_batches_tracked")}


LOOK_ALIKES = {
    "torchvision": norm5,
    "torchvision before 2017-10": old_torchvision,
    "gpleiss": gpleiss,
    "gpleiss before 2018": old_gpleiss,
    "monai": monai,
    "wandering007": wandering007,
}


def without_counters(state):
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert [k for k in expected if not torch.equal(actual[k], expected[k])] == []


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dialect", LOOK_ALIKES)
def test_read_recognises_the_dialect_and_loads_strictly(tmp_path, dialect, network):
    ours = state_of(**NETWORKS[network])
    torch.save(LOOK_ALIKES[dialect](ours), tmp_path / "theirs.pth")
    densenet, _ = convert_file(tmp_path / "theirs.pth", tmp_path / "ours.pth")
    assert densenet.dialect == dialect
    written = read_state_dict(tmp_path / "ours.pth")
    assert_same(without_counters(written), without_counters(ours))
    for efficient in (False, True):
        DenseNet(**NETWORKS[network], efficient=efficient).load_state_dict(written, strict=True)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("to", ["torchvision", "gpleiss", "monai", "wandering007"])
def test_write_gives_exactly_the_names_of_the_dialect(tmp_path, to, network):
    ours = state_of(**NETWORKS[network])
    torch.save(ours, tmp_path / "ours.pth")
    _, number = convert_file(tmp_path / "ours.pth", tmp_path / "theirs.pth", to)
    written = read_state_dict(tmp_path / "theirs.pth")
    assert number == len(written)
    assert_same(written, LOOK_ALIKES[to](ours))


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_every_dialect_reads_what_it_writes(dialect):
    ours = state_of(**NETWORKS["large stem"])
    assert_same(
        without_counters(to_canonical(from_canonical(ours, dialect), dialect)),
        without_counters(ours),
    )


@pytest.mark.parametrize("look_alike", [old_torchvision, old_wandering007], ids=lambda f: f.__name__)
def test_counters_that_a_file_lacks_are_zero(tmp_path, look_alike):
    torch.save(look_alike(state_of(**NETWORKS["bottleneck"])), tmp_path / "theirs.pth")
    counter = read_densenet(tmp_path / "theirs.pth").state["features.denseblock1.denselayer2.norm1.num_batches_tracked"]
    assert counter.dtype == torch.int64
    assert counter.shape == ()
    assert counter.item() == 0


def test_torchvision_densenet121_both_ways(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    theirs = randomised(torchvision.models.densenet121())
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    network = load_network(tmp_path / "theirs.pth", efficient=True).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(network(x), theirs(x))

    torch.save(network.state_dict(), tmp_path / "ours.pth")
    convert_file(tmp_path / "ours.pth", tmp_path / "back.safetensors", "normal")
    back = torchvision.models.densenet121()
    back.load_state_dict(read_state_dict(tmp_path / "back.safetensors"), strict=True)
    assert_same(back.state_dict(), theirs.state_dict())


def test_torchvision_calls_the_last_norm_norm5_however_many_blocks_there_are(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    theirs = randomised(torchvision.models.DenseNet(4, (2, 1), 6, bn_size=2, num_classes=3))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    convert_file(tmp_path / "theirs.pth", tmp_path / "ours.pth")
    convert_file(tmp_path / "ours.pth", tmp_path / "back.pth", "torchvision")
    back = torchvision.models.DenseNet(4, (2, 1), 6, bn_size=2, num_classes=3)
    back.load_state_dict(torch.load(tmp_path / "back.pth"), strict=True)
    assert_same(back.state_dict(), theirs.state_dict())


def test_timm_densenet121(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = randomised(timm.create_model("densenet121", num_classes=5, in_chans=2))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    network = load_network(tmp_path / "theirs.pth").eval()
    x = torch.randn(1, 2, 64, 64)
    torch.testing.assert_close(network(x), theirs(x))


def test_timm_features_only_is_an_encoder(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = randomised(timm.create_model("densenet121", pretrained=False, features_only=True))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    assert read_densenet(tmp_path / "theirs.pth").dialect == "timm features_only"
    network = load_network(tmp_path / "theirs.pth").eval()
    assert network.num_classes == 0
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(network.forward_features(x), theirs(x)[-1])


def test_monai_densenet121_both_ways(tmp_path):
    nets = pytest.importorskip("monai.networks.nets")
    theirs = randomised(nets.DenseNet121(spatial_dims=2, in_channels=1, out_channels=3))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    convert_file(tmp_path / "theirs.pth", tmp_path / "ours.pth")
    network = densenet121(in_channels=1, num_classes=3).eval()
    network.load_state_dict(torch.load(tmp_path / "ours.pth"), strict=True)
    x = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(network(x), theirs(x))

    convert_file(tmp_path / "ours.pth", tmp_path / "back.pth", "monai")
    assert_same(torch.load(tmp_path / "back.pth"), theirs.state_dict())


@pytest.mark.parametrize("dimensions", [1, 3])
def test_monai_of_other_dimensions_is_converted_both_ways(tmp_path, dimensions):
    nets = pytest.importorskip("monai.networks.nets")
    arguments = {"spatial_dims": dimensions, "in_channels": 2, "out_channels": 3, "init_features": 6}
    arguments |= {"growth_rate": 4, "block_config": (2, 1), "bn_size": 2}
    theirs = randomised(nets.DenseNet(**arguments))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    densenet, _ = convert_file(tmp_path / "theirs.pth", tmp_path / "ours.pth")
    assert densenet.architecture.dimensions == dimensions
    convert_file(tmp_path / "ours.pth", tmp_path / "back.pth", "monai")
    back = nets.DenseNet(**arguments)
    back.load_state_dict(torch.load(tmp_path / "back.pth"), strict=True)
    assert_same(back.state_dict(), theirs.state_dict())
