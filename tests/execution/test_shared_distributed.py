"""The shared buffer in two processes: data parallel, sharded, and with synchronised batch norms."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close, assert_identical, buffers, gradients
from twins import images, pair
from two_processes import EMPTY, SYNCHRONISED, loss, run

from efficient_densenet.execution import KEEP

every_keep = pytest.mark.parametrize("keep", KEEP)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("processes"))


@every_keep
def test_data_parallel_steps_are_those_of_the_ordinary_network(results, keep):
    for result in results:
        assert_close(result["data parallel"][keep], result["data parallel"]["ordinary"])


@every_keep
def test_sharded_parameters_get_the_same_gradients(results, keep):
    for result in results:
        expected = result["data parallel"]["ordinary"]
        assert_close(result["sharded"][keep], {k: t for k, t in expected.items() if k.startswith("gradient")})


@pytest.mark.parametrize("how", [*KEEP, EMPTY])
@pytest.mark.parametrize("name", SYNCHRONISED)
def test_synchronised_norms_equal_one_process_on_the_whole_batch(results, name, how):
    """Outputs, all gradients and the running averages, with shards of unequal size."""
    ordinary, _ = pair(SYNCHRONISED[name])
    x = images(5).requires_grad_()
    output = ordinary(x)
    loss(output, slice(None)).backward()

    first, second = (result["synchronised"][f"{name} {how}"] for result in results)
    assert_close(
        {k: torch.cat([first["each"][k], second["each"][k]]) for k in first["each"]},
        {"output": output.detach(), "input gradient": x.grad},
    )
    assert_close({k: first["summed"][k] + second["summed"][k] for k in first["summed"]}, gradients(ordinary))
    assert_close(first["same"], buffers(ordinary))
    assert_identical(first["same"], second["same"])


@every_keep
@pytest.mark.parametrize(("name", "groups"), [("plain", 4 + 3), ("bottleneck", 7 + 5), ("imagenet stem", 1 + 7 + 5)])
def test_each_produced_group_of_channels_is_sent_once_each_way(results, name, groups, keep):
    """A group: a block's input, what one layer makes, a bottleneck output, the stem's channels; not the head's."""
    for result in results:
        assert result["synchronised"][f"{name} {keep}"]["collectives"] == [groups, 0, groups, groups]


def test_frozen_norms_send_nothing(results):
    assert results[0]["frozen"]["collectives"] == [0, 0, 0, 0]
