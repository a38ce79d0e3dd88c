"""Training steps on a GPU, on the Triton kernels: recorded, replayed, captured, on several streams and devices."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
import triton_processes
from on_gpu import close, gpu
from operands import EVERY_OPERATION
from torch.nn import functional as F

from efficient_densenet import DenseNet, densenet_cifar, ops
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.kinks import move_zeros_into_gaps
from efficient_densenet.ops import eager
from efficient_densenet.ops import triton as kernels
from efficient_densenet.ops.triton import graphs, recording

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("unchecked")


def networks(dtype=torch.float32):
    torch.manual_seed(0)
    ordinary = densenet_cifar(16, 12, bottleneck=True).cuda().to(dtype)
    efficient = densenet_cifar(16, 12, bottleneck=True, efficient=True).cuda().to(dtype)
    efficient.load_state_dict(ordinary.state_dict())
    images, labels = torch.randn(8, 3, 32, 32, device="cuda", dtype=dtype), torch.arange(8, device="cuda")
    return ordinary, efficient, images, labels


def gradients(network, images, labels):
    network.zero_grad()
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in network.parameters())]


@gpu
@pytest.mark.usefixtures("precise")
def test_gpu_training_step_against_float64():
    """No activation is so near zero that chance decides whether the rectifier lets it pass."""
    ordinary, efficient, images, labels = networks()
    move_zeros_into_gaps(ordinary, images, Place("cuda"))
    efficient.load_state_dict(ordinary.state_dict())
    exact = gradients(copy.deepcopy(ordinary).double(), images.double(), labels)
    theirs, ours = gradients(ordinary, images, labels), gradients(efficient, images, labels)

    def error(found):
        return max(((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True))

    assert error(ours) <= 2 * error(theirs) + 1e-6


@gpu
@pytest.mark.parametrize("keep", ["bottleneck", "features", "inputs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_autocast_training_step_with_a_stem(dtype, keep):
    """In half precision, as near to float64 as the ordinary network."""
    torch.manual_seed(0)
    options = {"growth_rate": 12, "block_config": (2, 3), "num_init_features": 24, "bn_size": 4, "num_classes": 10}
    ordinary = DenseNet(input_size=64, **options).cuda()
    efficient = DenseNet(input_size=64, **options, efficient=True, keep=keep).cuda()
    efficient.load_state_dict(ordinary.state_dict())
    images, labels = torch.randn(8, 3, 64, 64, device="cuda"), torch.arange(8, device="cuda")
    # All together: the gradient of the stem's scale is zero, which the norms behind it take out again.
    exact = torch.cat([g.flatten() for g in gradients(copy.deepcopy(ordinary).double(), images.double(), labels)[1:]])
    errors = []
    for network in (ordinary, efficient):
        with torch.autocast("cuda", dtype):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        found = torch.cat([p.grad.double().flatten() for p in network.parameters()])
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert errors[1] <= 1.5 * errors[0]


@gpu
def test_gpu_network_runs_on_the_kernels(monkeypatch):
    _, efficient, images, labels = networks()
    for name in EVERY_OPERATION:
        monkeypatch.setattr(eager, name, None)
    gradients(efficient, images, labels)


@gpu
def test_gpu_compiles_without_graph_breaks():
    _, efficient, images, labels = networks()
    expected = gradients(efficient, images, labels)
    found = gradients(torch.compile(efficient, fullgraph=True), images, labels)
    close(found, expected, 1e-3)


@gpu
@pytest.mark.usefixtures("deterministic")
def test_gpu_graph_of_a_training_step():
    """Captured once and replayed on other images, it computes what the uncaptured step does."""
    _, efficient, images, labels = networks()
    other = torch.randn_like(images)
    optimizer = torch.optim.SGD(efficient.parameters(), lr=0.1)
    start = copy.deepcopy(efficient.state_dict())
    static = images.clone()

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(efficient(static), labels)
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and makes the gradients
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    # Whatever the steps found out about the modules is let go of, and its memory is taken by others.
    efficient.eval()
    efficient(images)
    efficient.train()
    taken = [torch.full((n,), -1, dtype=torch.int32, device=images.device) for n in range(1, 2000, 7)]

    def restart():
        with torch.no_grad():
            for name, tensor in efficient.state_dict().items():
                tensor.copy_(start[name])

    results = []
    for run in (graph.replay, step):
        restart()
        losses = []
        for batch in (images, other):
            static.copy_(batch)
            loss = run()
            losses.append((captured if loss is None else loss).detach().clone())
        results.append([*losses, *(t.clone() for t in efficient.state_dict().values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all((values == -1).all() for values in taken)


@gpu
@pytest.mark.usefixtures("deterministic")
def test_gpu_streams_side_by_side():
    _, efficient, images, labels = networks()
    expected = gradients(efficient, images, labels)
    twins = [copy.deepcopy(efficient) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in twins]
    torch.cuda.synchronize()
    found = []
    for stream, twin in zip(streams, twins, strict=True):
        with torch.cuda.stream(stream):
            found.append(gradients(twin, images, labels))
    torch.cuda.synchronize()
    for twin in found:
        assert all(torch.equal(a, b) for a, b in zip(twin, expected, strict=True))


@pytest.fixture
def recordings(monkeypatch):
    """Those that the test makes, and their graphs."""
    made = {}
    monkeypatch.setattr(recording, "_recordings", made)
    monkeypatch.setattr(recording, "_graphs", graphs.Graphs())
    return made


def with_a_stem(**options):
    """A network with all that runs on kernels: stem, layers with a bottleneck, transition and head."""
    torch.manual_seed(0)
    sizes = {"growth_rate": 12, "block_config": (2, 3), "num_init_features": 24, "bn_size": 4, "num_classes": 10}
    network = DenseNet(input_size=64, **sizes, efficient=True, **options).cuda().to(memory_format=torch.channels_last)
    return network, torch.randn(8, 3, 64, 64, device="cuda"), torch.arange(8, device="cuda")


def trained(network, images, labels, steps=5, autocast=False):
    """What each of some steps makes, kept elsewhere, so that the next step gets the memory of the last."""
    made = []
    for _ in range(steps):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            found = gradients(network, images, labels)
        made.append([t.cpu() for t in (*found, *network.buffers())])
        del found
    return made


def equal(some, others):
    return all(torch.equal(a, b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True))


@gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("keep", ["bottleneck", "features", "inputs"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gpu_replayed_steps_are_those_started_one_by_one(keep, autocast, recordings, monkeypatch):
    """As graphs, kernel by kernel from the recordings, and from the launchers themselves."""
    replayed = trained(*with_a_stem(keep=keep), autocast=autocast)
    assert recording._graphs._kept and None not in recordings.values()
    recordings.clear()
    monkeypatch.setattr(graphs, "_MOST_LAUNCHES", 0)
    monkeypatch.setattr(recording, "_graphs", graphs.Graphs())
    assert equal(trained(*with_a_stem(keep=keep), autocast=autocast), replayed)
    assert recordings and not recording._graphs._kept
    if not autocast:  # there the layers one by one round the gradients of weights
        monkeypatch.setattr(recording, "repeated", lambda *_: False)
        monkeypatch.setattr(ops, "runs_layers", lambda *_: False)
        assert equal(trained(*with_a_stem(keep=keep)), replayed)


@gpu
@pytest.mark.usefixtures("deterministic")
def test_gpu_replays_follow_memory_and_streams(recordings):
    """Another model of the same shapes, another batch, other addresses and other streams come in between."""
    network, images, labels = with_a_stem()
    expected = gradients(network, images, labels)
    twin, held = copy.deepcopy(network), []
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    for i in range(24):
        torch.cuda.synchronize()
        if i % 8 == 7:  # what was free is taken by others, and what they had becomes free
            held = [torch.full((n,), torch.nan, device="cuda") for n in range(i, 300_000, 40_009)]
        if i % 5 == 4:
            gradients(network, images[:3], labels[:3])
        with torch.cuda.stream(streams[i // 2 % 3]):
            found = gradients((network, twin)[i % 2], images, labels)
        torch.cuda.synchronize()
        assert equal([found], [expected])
    assert recording._graphs._kept and all(values.isnan().all() for values in held)


@gpu
@pytest.mark.usefixtures("deterministic")
def test_gpu_threads_side_by_side(recordings):
    """Each with a network and a stream of its own; one captures while the others launch."""
    network, images, labels = with_a_stem()
    expected = trained(copy.deepcopy(network), images, labels)
    torch.cuda.synchronize()
    recordings.clear()
    found, barrier = {}, threading.Barrier(3)

    def run(number, own):
        barrier.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            found[number] = trained(own, images, labels)

    threads = [threading.Thread(target=run, args=(i, copy.deepcopy(network))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(equal(steps, expected) for steps in found.values())


@gpu
def test_gpu_replays_draw_no_random_numbers(recordings):
    network, images, labels = with_a_stem()
    before = torch.cuda.get_rng_state()
    trained(network, images, labels)
    assert recording._graphs._kept and torch.equal(torch.cuda.get_rng_state(), before)


@gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("failing", ["cuGraphInstantiateWithFlags", "cuGraphLaunch"])
def test_gpu_without_memory_for_a_graph_kernels_start_one_by_one(failing, recordings, monkeypatch):
    expected = trained(*with_a_stem())
    recordings.clear()
    monkeypatch.setattr(recording, "_graphs", graphs.Graphs())
    right = graphs._ask

    def ask(name, *arguments):
        if name == failing:
            raise RuntimeError("out of memory")
        right(name, *arguments)

    monkeypatch.setattr(graphs, "_ask", ask)
    with pytest.warns(UserWarning, match="a CUDA graph of them cannot be made or replayed: out of memory"):
        assert equal(trained(*with_a_stem()), expected)
    assert not recording._graphs._kept


@gpu
@pytest.mark.usefixtures("deterministic")
def test_gpu_a_thread_that_waits_for_the_device_during_a_capture(recordings, monkeypatch):
    """It gets an error of CUDA's, and the capture is lost. Then all goes on: random numbers, memory, and graphs."""
    expected, errors = trained(*with_a_stem()), []
    recordings.clear()
    monkeypatch.setattr(recording, "_graphs", graphs.Graphs())
    start_each = recording.Recording._start_each

    def wait():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            errors.append(error)

    def start(self, addresses, stream):
        start_each(self, addresses, stream)
        if not errors and stream == graphs._stream(0):  # a capture
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join()

    monkeypatch.setattr(recording.Recording, "_start_each", start)
    with pytest.warns(UserWarning, match="a CUDA graph of them cannot be made or replayed"):
        assert equal(trained(*with_a_stem()), expected)
    assert errors and recording._graphs._kept
    F.dropout(torch.ones(8, device="cuda"))
    torch.cuda.empty_cache()


@gpu
@pytest.mark.usefixtures("precise")
def test_gpu_compiled_steps_as_graphs(recordings):
    """`torch.compile` warms up in memory of its own, captures, and replays; our own graphs must not be in the way."""
    network, images, labels = with_a_stem()
    expected = trained(network, images, labels)
    compiled = torch.compile(with_a_stem()[0], mode="reduce-overhead")
    for step, before in zip(trained(compiled, images, labels), expected, strict=True):
        close(step, before, 1e-3)


@gpu
@pytest.mark.usefixtures("precise")
def test_gpu_fully_sharded(recordings, tmp_path):
    """Weights get their memory back for each block, on another stream, and lose it again."""
    network, images, labels = with_a_stem()
    network.to(memory_format=torch.contiguous_format)  # what is sharded must be
    expected = gradients(copy.deepcopy(network), images, labels)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        for name, part in network.features.named_children():
            if name.startswith("denseblock"):
                torch.distributed.fsdp.fully_shard(part)
        torch.distributed.fsdp.fully_shard(network)
        for _ in range(5):
            network.zero_grad()
            loss = F.cross_entropy(network(images), labels)
            loss.backward()
            found = [loss.detach(), *(p.grad.full_tensor() for p in network.parameters())]
            some, others = (torch.cat([t.flatten() for t in tensors]) for tensors in (found, expected))
            assert (some - others).norm() <= 1e-4 * others.norm()
    finally:
        torch.distributed.destroy_process_group()


@gpu
def test_gpu_two_processes_train_what_the_ordinary_network_does(tmp_path):
    """Data parallel, and with two GPUs also with synchronised norms: gradients and running averages."""
    results = triton_processes.run(tmp_path)
    for kind in triton_processes.KINDS:
        for result in results:
            # All gradients together: that of the stem's scale is zero, which the norms behind it take out again.
            for part in ("gradient of", ""):
                expected, found = (
                    torch.cat([t.flatten().double() for name, t in result[f"{kind}, {way}"].items() if part in name])
                    for way in ("ordinary", "efficient")
                )
                assert (found - expected).norm() <= 1e-4 * expected.norm()
        first, second = (result[f"{kind}, efficient"] for result in results)
        assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("gradient"))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.usefixtures("deterministic")
def test_gpu_runs_on_another_device_than_the_current():
    _, efficient, images, labels = networks()
    expected = gradients(efficient, images, labels)
    found = gradients(efficient.to("cuda:1"), images.to("cuda:1"), labels.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    close([t.cpu() for t in found], [t.cpu() for t in expected], 1e-4)


@gpu
def test_gpu_float64_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(kernels, "_state", {"warned": set(), "failed": set()})
    _, efficient, images, labels = networks(torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            gradients(efficient, images, labels)
    assert [str(w.message) for w in caught if "Triton" in str(w.message)] == [
        "plain PyTorch runs instead of the Triton kernels, more slowly: there are none for torch.float64"
    ]
