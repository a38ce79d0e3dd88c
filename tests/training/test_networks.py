"""Networks of other libraries and of users, and data modules of users."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
import torchvision
from tiny_run import run

from efficient_densenet import report
from efficient_densenet.adopt.adopted import adopted_modules
from efficient_densenet.cli import main
from efficient_densenet.errors import UserError
from efficient_densenet.training import plots
from efficient_densenet.training.networks import head_of, library_network, start_from

LIBRARY = "--model.network=efficient_densenet.training.networks.library_network"
BRIEF = ["--trainer.max_epochs=1", "--model.scheduler=null"]


def last(folder):
    return folder / "tiny" / "version_0" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("name", ["torchvision:shufflenet_v2_x0_5", "timm:test_resnet"])
@pytest.mark.filterwarnings("ignore")
def test_a_network_of_another_library_is_trained_from_its_weights_and_predicts(tmp_path, images, name):
    library, _, own_name = name.partition(":")
    theirs = timm.create_model(own_name) if library == "timm" else torchvision.models.get_model(own_name)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "theirs.pth")
    network = [LIBRARY, f"--model.network.name={name}", f"--model.weights={tmp_path / 'theirs.pth'}"]
    frozen = ["--model.freeze=backbone", *BRIEF]
    assert run("fit", tmp_path, *images, *network, *frozen) == 0
    trained = torch.load(last(tmp_path), weights_only=True)["state_dict"]
    head = {id(p) for p in head_of(theirs).parameters()}
    for own, parameter in theirs.named_parameters():
        assert (id(parameter) in head) == (trained[f"network.{own}"].shape != parameter.shape)
        if id(parameter) not in head:
            assert torch.equal(trained[f"network.{own}"], parameter)

    output = tmp_path / "a.csv"
    assert main(["predict", "--checkpoint", str(last(tmp_path)), "--output", str(output), images[3]]) == 0
    rows = list(csv.reader(output.open()))
    assert rows[0] == ["path", "cat", "dog", "fox"]
    assert len(rows) == 1 + 36


SMALL = {"block_config": (2, 2), "growth_rate": 4}


def test_weights_are_adapted_to_grey_images_and_to_older_files(tmp_path):
    theirs = timm.create_model("test_resnet").state_dict()
    torch.save({n: t for n, t in theirs.items() if not n.endswith("num_batches_tracked")}, tmp_path / "theirs.pth")
    network = library_network("timm:test_resnet", in_channels=1, num_classes=1000)
    start_from(network, str(tmp_path / "theirs.pth"), "timm:test_resnet")
    own = network.state_dict()
    first = next(name for name, tensor in theirs.items() if tensor.dim() == 4)
    torch.testing.assert_close(own.pop(first), theirs.pop(first).sum(1, keepdim=True))
    torch.testing.assert_close(own, theirs)
    with pytest.raises(UserError, match="holds the weights of another network"):
        start_from(library_network("torchvision:shufflenet_v2_x0_5"), str(tmp_path / "theirs.pth"), "")


def test_monais_own_weights_fit_its_network(tmp_path):
    arguments = {"spatial_dims": 3, "block_config": (2, 2), "growth_rate": 4, "init_features": 8}
    first, second = (library_network("monai:DenseNet121", 1, classes, arguments=arguments) for classes in (2, 5))
    torch.save(first.state_dict(), tmp_path / "theirs.pth")
    with pytest.warns(UserWarning, match="the classifier is a new one"):
        start_from(second, str(tmp_path / "theirs.pth"), "monai:DenseNet121")
    torch.testing.assert_close(second.features.state_dict(), first.features.state_dict())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("torchvision:densenet121", {}),
        ("timm:densenet121", SMALL),
        ("monai:DenseNet121", SMALL | {"init_features": 8}),
        ("monai:DenseNet121", SMALL | {"init_features": 8, "spatial_dims": 3}),
    ],
)
def test_densenets_of_other_libraries_are_made_efficient(name, arguments):
    network = library_network(name, num_classes=5, arguments=arguments)
    assert {entry.now for entry in report(network).entries if "block" in entry.name} == {"shared buffer"}
    assert head_of(network).out_features == 5
    ordinary = library_network(name, num_classes=5, efficient=False, arguments=arguments)
    assert list(ordinary.state_dict()) == list(network.state_dict())
    assert not adopted_modules(ordinary)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("densenet121", "write torchvision:NAME, timm:NAME or monai:NAME"),
        ("keras:densenet121", "write torchvision:NAME, timm:NAME or monai:NAME"),
        ("torchvision:nothing", "torchvision:nothing cannot be built: Unknown model nothing"),
        ("timm:nothing", "timm:nothing cannot be built: Unknown model"),
        ("monai:Nothing", "monai:Nothing cannot be built"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(UserError, match=message):
        library_network(name)


def test_torchvision_takes_colour_images_alone():
    with pytest.raises(UserError, match=r"set data\.in_channels to 3"):
        library_network("torchvision:resnet18", in_channels=1)


OWN = """
import torch
from lightning import LightningDataModule
from torch import nn

class MyNet(nn.Sequential):
    def __init__(self, num_classes: int, width: int = 4):
        super().__init__(nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.LazyLinear(num_classes))
        self(torch.zeros(2, 2, 8, 8))

def make_net(out_channels: int = 2) -> nn.Module:
    return MyNet(out_channels)

class MyData(LightningDataModule):
    def __init__(self, said: bool = True, keyed: bool = False):
        super().__init__()
        self.keyed = keyed
        if said:
            self.class_names = ["left", "right"]

    def train_dataloader(self):
        images = torch.randn(16, 2, 8, 8)
        pairs = [(image, i % 2) for i, image in enumerate(images)]
        rows = [{"image": image, "label": label} for image, label in pairs] if self.keyed else pairs
        return torch.utils.data.DataLoader(rows, batch_size=4)

    val_dataloader = train_dataloader
    test_dataloader = train_dataloader
"""


class Module(str):
    folder: Path


@pytest.fixture
def own_classes(tmp_path, monkeypatch):
    """The name of a module of a user's in the present folder."""
    module = Module(f"own_{tmp_path.name}")
    module.folder = tmp_path
    (tmp_path / f"{module}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    return module


def fit(folder, network, data):
    """Train it from a configuration that says nothing else."""
    trainer = "{accelerator: cpu, devices: 1, max_epochs: 1}"
    (folder / "own.yaml").write_text(f"model: {{network: {network}}}\ndata: {data}\ntrainer: {trainer}")
    with mock.patch.object(plots, "confusion_matrix"), mock.patch.object(plots, "curves"):
        return main(["fit", "--config", "own.yaml"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", ["MyNet", "make_net"])
@pytest.mark.parametrize("keyed", ["false", "true"])
def test_classes_of_a_user_are_taken_as_they_are(own_classes, capsys, network, keyed):
    data = f"{{class_path: {own_classes}.MyData, init_args: {{keyed: {keyed}}}}}"
    assert fit(own_classes.folder, f"{own_classes}.{network}", data) == 0
    assert "the data decide: 2 classes (left, right)" in capsys.readouterr().out
    last = own_classes.folder / "runs/own/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["class_names"] == ["left", "right"]
    assert main(["test", "--config", "runs/own/version_0/config.yaml"]) == 0
    assert "measured on 16 test images" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_what_the_data_do_not_say_is_the_networks(own_classes, capsys):
    data = f"{{class_path: {own_classes}.MyData, init_args: {{said: false}}}}"
    assert fit(own_classes.folder, f"{{class_path: {own_classes}.MyNet, init_args: {{num_classes: 3}}}}", data) == 0
    last = own_classes.folder / "runs/own/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["class_names"] == ["0", "1", "2"]
    assert fit(own_classes.folder, f"{own_classes}.MyNet", data) == 2
    assert "the data do not say what num_classes of model.network is: set it there" in capsys.readouterr().err
