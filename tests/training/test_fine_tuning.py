"""Starting from weights: parts that stay as they are, rates by layer, averages of the weights."""

from __future__ import annotations

import pytest
import torch
from tiny_run import run
from torch import nn
from torch.optim.lr_scheduler import StepLR

from efficient_densenet import DenseNet
from efficient_densenet.training.optimisation import make_optimizer, make_schedule

NETWORK = {"num_init_features": 8, "growth_rate": 4, "block_config": (1, 1), "num_classes": 3}
CONSTANT = "--model.scheduler=null"


@pytest.fixture
def weights(tmp_path):
    """Those of a network that has been trained, in ``weights.pth``, by the names in a checkpoint."""
    torch.manual_seed(5)
    network = DenseNet(**NETWORK)
    network(torch.randn(4, 3, 32, 32))  # which moves the running statistics
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    return {f"network.{name}": tensor for name, tensor in network.state_dict().items()}


def last(folder, name="version_0"):
    return torch.load(folder / "tiny" / name / "checkpoints" / "last.ckpt", weights_only=True)


def changed(before, after):
    return {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}


HEAD = {"network.classifier.weight", "network.classifier.bias"}


@pytest.mark.parametrize(
    ("freeze", "stays"),
    [
        ("backbone", "features"),
        ("stem", "features.conv0"),
        ("blocks", "features.denseblock1 features.transition1 features.denseblock2"),
        ("[stem,features.denseblock2]", "features.conv0 features.denseblock2"),
    ],
)
@pytest.mark.parametrize("efficient", ["false", "true"])
def test_what_is_frozen_stays_as_it_is_with_its_statistics(tmp_path, images, weights, freeze, stays, efficient):
    options = [f"--model.weights={tmp_path / 'weights.pth'}", f"--model.network.efficient={efficient}"]
    assert run("fit", tmp_path, *images, *options, f"--model.freeze={freeze}", "--trainer.max_epochs=1") == 0
    prefixes = tuple(f"network.{name}." for name in stays.split())
    moved = {name for name in weights if not name.startswith(prefixes)}
    assert changed(weights, last(tmp_path)["state_dict"]) == moved


def test_parts_are_trained_from_an_epoch_on_also_where_a_run_goes_on(tmp_path, images, weights):
    options = [f"--model.weights={tmp_path / 'weights.pth'}", "--model.freeze=backbone", "--model.unfreeze_at=1"]
    assert run("fit", tmp_path, *images, *options, CONSTANT, "--trainer.max_epochs=1") == 0
    assert changed(weights, last(tmp_path)["state_dict"]) == HEAD
    assert run("fit", tmp_path, *images, *options, CONSTANT, "--ckpt_path=last") == 0
    assert run("fit", tmp_path, *images, *options, CONSTANT) == 0
    resumed, unbroken = (last(tmp_path, name)["state_dict"] for name in ("version_0", "version_1"))
    assert changed(weights, resumed) == weights.keys()
    assert not changed(resumed, unbroken)


def test_groups_of_parameters():
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(3, 4, 3))
    network.add_module("body", nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    network.add_module("body2", nn.Linear(4, 2))

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.5, weight_decay=0.1)

    optimizer = make_optimizer(sgd, network, {"stem": 0.1, "body": 0.2, "body.1": 0.4}, decay_norms_and_biases=False)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert {name: found[id(p)] for name, p in network.named_parameters()} == {
        "stem.weight": (0.05, 0.1),
        "stem.bias": (0.05, 0.0),
        "body.0.weight": (0.1, 0.1),
        "body.0.bias": (0.1, 0.0),
        "body.1.weight": (0.2, 0.0),
        "body.1.bias": (0.2, 0.0),
        "body2.weight": (0.5, 0.1),
        "body2.bias": (0.5, 0.0),
    }


def test_the_rate_rises_before_the_schedule_begins():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [], "lr": 0.1}], lr=1.0)
    schedule = make_schedule(lambda made: StepLR(made, step_size=2, gamma=0.5), optimizer, warmup=3)
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    expected = [0.25, 0.5, 0.75, 1, 1, 0.5, 0.5, 0.25]
    assert rates == [pytest.approx([rate, 0.1 * rate]) for rate in expected]


def test_an_exponential_average_leaves_what_is_trained_alone_and_goes_on(tmp_path, images):
    average = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]
    assert run("fit", tmp_path, *images, CONSTANT) == 0
    assert run("fit", tmp_path, *images, CONSTANT, *average) == 0
    assert run("fit", tmp_path, *images, CONSTANT, *average, "--trainer.max_epochs=1") == 0
    assert run("fit", tmp_path, *images, CONSTANT, *average, "--ckpt_path=last") == 0
    plain, averaged, resumed = (last(tmp_path, f"version_{i}") for i in range(3))
    assert not changed(plain["state_dict"], averaged["current_model_state"])
    assert not changed(averaged["state_dict"], resumed["state_dict"])
    assert {n for n in plain["state_dict"] if "conv" in n} <= changed(plain["state_dict"], averaged["state_dict"])


def test_the_average_of_epochs_has_statistics_of_its_own(tmp_path, images, weights):
    """It is the mean of the weights that the two epochs began with; then the norms see all training images again."""
    average = ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_epoch_start=1"]
    average += ["--trainer.callbacks.swa_lrs=0.1", "--trainer.callbacks.device=cpu"]
    states = []
    for efficient in ("false", "true"):
        options = [f"--model.weights={tmp_path / 'weights.pth'}", f"--model.network.efficient={efficient}", CONSTANT]
        assert run("fit", tmp_path, *images, *options, *average) == 0
        states.append(last(tmp_path, f"version_{len(states)}")["state_dict"])
    assert run("fit", tmp_path, *images, *options, "--trainer.max_epochs=1") == 0
    once = last(tmp_path, "version_2")["state_dict"]
    averaged = states[1]
    for name in weights:
        if name.endswith("num_batches_tracked"):
            assert averaged[name] == 2
        elif "running" not in name:
            torch.testing.assert_close(averaged[name], (weights[name] + once[name]) / 2)
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)
