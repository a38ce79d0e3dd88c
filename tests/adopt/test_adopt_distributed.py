"""Two processes: data parallel, sharded, and with synchronised norms, converted before and after `make_efficient`."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close, buffers, gradients
from others import images, pair
from two_processes_adopted import MODELS, WAYS, features_without_final_norm, run

every_model = pytest.mark.parametrize("name", MODELS)
either_way = pytest.mark.parametrize("way", WAYS[1:])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("processes"))


@either_way
@every_model
def test_data_parallel_steps_are_those_of_the_ordinary_model(results, name, way):
    for result in results:
        assert_close(result["data parallel"][f"{name} {way}"], result["data parallel"][f"{name} ordinary"])


@either_way
def test_sharded_parameters_get_the_same_gradients(results, way):
    for result in results:
        assert_close(result["sharded"][way], result["sharded"]["ordinary"])


@either_way
@every_model
def test_synchronised_norms_equal_one_process_on_the_whole_batch(results, name, way):
    ordinary = features_without_final_norm(pair(MODELS[name]())[0])
    x = images(n=4).requires_grad_()
    output = ordinary(x)
    output.square().sum().backward()
    first, second = (result["synchronised"][f"{name} {way}"] for result in results)
    each = {k: torch.cat([first["each"][k], second["each"][k]]) for k in first["each"]}
    assert_close(each, {"output": output.detach(), "input gradient": x.grad})
    assert_close({k: first["summed"][k] + second["summed"][k] for k in first["summed"]}, gradients(ordinary))
    assert_close(first["same"], buffers(ordinary))
