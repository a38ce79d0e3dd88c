"""`efficient-densenet inspect`: the report of a model by its name, and mistakes in what is asked for."""

from __future__ import annotations

import sys

import pytest

from efficient_densenet.cli import main

NAMES = {
    "torchvision:densenet121": 4,
    "timm:densenet121": 4,
    "timm:densenetblur121d": 4,
    "monai:DenseNet121": 4,
    "monai:DenseNet121 --set spatial_dims=3 in_channels=1": 4,
    "monai:DenseNet121 --image 1,32,32,32": 4,
    "torchxrayvision:DenseNet": 4,
    "smp:densenet121": 4,
    "efficient_densenet.models:DenseNet --set num_classes=3 --image 3,32,32": 3,
    "look_alikes:VarargsNetwork --image 3,16,16 --keep inputs": 2,
}


@pytest.fixture
def unplanned(monkeypatch):
    """Planning the steps takes most of the time; their peak is tested elsewhere."""
    monkeypatch.setattr(sys.modules["efficient_densenet.adopt.report"], "_peaks", lambda *_: None)


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_by_its_name(name, capsys):
    assert main(["inspect", *name.split()]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("Kept for the backward pass") and output.err == ""
    assert len([line for line in output.out.splitlines() if "block" in line.split(" ")[0]]) >= NAMES[name]


def test_what_was_asked_for_is_shown(capsys):
    main(["inspect", "torchvision:DenseNet", "--set", "block_config=(2,3)", "--image", "3,64,64", "--keep", "inputs"])
    output = capsys.readouterr().out
    assert "MB per image of 3×64×64" in output and "shared buffer, inputs" in output


@pytest.mark.usefixtures("unplanned")
def test_parts_that_a_model_calls_one_by_one_are_no_promise(capsys):
    main(["inspect", "smp:densenet121"])
    assert "transition3, features: the model does not call it in one piece" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("densenet121", "names no model"),
        ("torchvision:", "names no model"),
        (":densenet121", "names no model"),
        ("torchvision:densenet999", "was not found"),
        ("no_such_package:Net", "install it with: pip install no_such_package"),
        ("timm:no_such_model", "could not be built"),
        ("monai:DenseNet121 --set spatial_dims=7", "could not be built"),
        ("torchvision:densenet121 --set growth", "--set takes NAME=VALUE"),
        ("torchvision:densenet121 --set no_such=3", "could not be built"),
        ("torchvision:densenet121 --image 1,224,224", "does not run on an image of 1×224×224"),
        ("torchvision:densenet121 --image 3,8,8", "does not run on an image of 3×8×8"),
        ("torchvision:resnet18_", "was not found"),
        ("./nets.py:Net", "./nets.py cannot be imported"),
        ("math:sqrt --set x=3", "could not be built"),
        ("collections:OrderedDict", "which is no torch.nn.Module"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments, message, capsys):
    assert main(["inspect", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("efficient-densenet: error: ")
    assert "Traceback" not in error and error.count("\n") == 1


def test_a_model_without_anything_dense(capsys):
    assert main(["inspect", "torch.nn:Linear", "--set", "in_features=4", "out_features=2", "--image", "3,4"]) == 0
    assert capsys.readouterr().out == "Nothing in this model looks like a part of a DenseNet.\n"


def test_a_model_of_which_nothing_can_be_converted(capsys):
    assert main(["inspect", "torchvision:resnet18", "--image", "3,32,32"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("Nothing in this model can be converted.")
    assert told[2].startswith("layer2, layer3, layer4: a convolution reads features without a norm")
    assert len(told) == 3


@pytest.mark.parametrize("image", ["3", "3,0,4", "a,b"])
def test_shapes_that_are_none(image, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "torchvision:densenet121", "--image", image])
    assert caught.value.code == 2 and "is not a shape such as 3,224,224" in capsys.readouterr().err
