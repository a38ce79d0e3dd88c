"""The shared buffer as PyTorch's compilers, exporters and transformations see it."""

from __future__ import annotations

import io

import pytest
import torch
from comparison import assert_close, training_step
from torch._dynamo.testing import CompileCounterWithBackend
from twins import BOTTLENECK, IMAGENET, images, pair

from efficient_densenet import DenseNet
from efficient_densenet.execution import KEEP, operators, stage_operators, stem_operators
from efficient_densenet.execution.plan import sources

EVERY_CHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


def tensor(*shape):
    return torch.rand(shape, dtype=torch.float64) + 0.5


def stage_arguments(per_layer, pool, keep, masked=False, requires_grad=True, biased=False, contiguous=True):
    """Two layers on four channels that make three each, and perhaps a transition; the second norm is frozen."""
    torch.manual_seed(0)
    shapes = []
    for width in (4, 7):
        shapes += [(3, width, 3, 3)] if per_layer == 1 else [(6, width, 1, 1), (3, 6, 3, 3)]
    made = [shape[0] for shape in shapes]
    if pool:
        shapes.append((5, 10, 1, 1))
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    norm_weights, norm_biases = ([tensor(w.shape[1]) for w in weights] for _ in range(2))
    biases = [tensor(len(w)) for w in weights] if biased else []
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    for leaf in (x, *norm_weights, *norm_biases, *weights, *biases):
        leaf.requires_grad_(requires_grad)
    uses_batch = [i != 1 for i in range(len(weights))]
    constants = [tensor(weights[1].shape[1]) for _ in range(2)]
    masks = [torch.randn(2, 3, 6, 5) > 0 for _ in range(2)] if masked else []
    read = [channel for source in sources(4, made, per_layer, pool > 0) for channel in source]
    eps, scales = [1e-5] * len(norm_weights), [2.0] * len(masks)
    plain = (uses_batch, eps, read, contiguous, scales, per_layer, pool, keep, "")
    return x, *stage_operators.StageArguments(norm_weights, norm_biases, weights, biases, masks, constants, *plain)


@pytest.mark.parametrize(
    ("per_layer", "pool", "keep", "masked"),
    [(1, 0, "features", True), (2, 2, "bottleneck", False), (2, 2, "features", False), (2, 2, "inputs", True)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_stage_forward_is_a_proper_operator(per_layer, pool, keep, masked, biased):
    arguments = stage_arguments(per_layer, pool, keep, masked, biased=biased)
    torch.library.opcheck(stage_operators.run_stage.forward_operator, arguments, test_utils=EVERY_CHECK)


@pytest.mark.parametrize("per_layer", [1, 2])
@pytest.mark.parametrize(("pool", "contiguous"), [(0, False), (0, True), (2, True)])
@pytest.mark.parametrize("keep", KEEP)
def test_fakes_are_like_the_real_thing(per_layer, pool, contiguous, keep):
    """Shapes, types and memory layouts of all that the operators return."""
    arguments = stage_arguments(per_layer, pool, keep, requires_grad=False, contiguous=contiguous)
    packed = stage_operators.run_stage.forward_operator(*arguments)
    x, saved = stage_operators.run_stage.saves(arguments[0], packed, stage_operators.StageArguments(*arguments[1:]))
    need_weights = [i != 0 for i in range(2 * per_layer + (pool > 0))]
    backward = ([torch.randn_like(packed[0])], x, saved, True, need_weights, *arguments[1:])
    torch.library.opcheck(stage_operators.run_stage.forward_operator, arguments, test_utils=EVERY_CHECK[:3])
    torch.library.opcheck(
        stage_operators.run_stage.backward_operator, backward, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("convolutions", "blurred", "keeps_last"), [(0, False, True), (1, True, False), (1, True, True), (3, False, True)]
)
def test_the_stems_operators_are_proper(convolutions, blurred, keeps_last, frozen):
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    weights = [torch.randn(4, 4, 3, 3, dtype=torch.float64) for _ in range(convolutions)]
    biases = [tensor(4) for _ in weights]
    norms = convolutions or 1
    norm_weights, norm_biases = ([tensor(4) for _ in range(norms)] for _ in range(2))
    constants = [tensor(4) for _ in range(2 * norms if frozen else 0)]
    entry = ([2, 2], [1, 1], [1, 1]) if convolutions else ([], [], [])
    filters, blur = ([tensor(4, 1, 3, 3)], ([1] * 4, "reflect", [2, 2])) if blurred else ([], ([], "", []))
    plain = ([not frozen] * norms, [1e-5] * norms, *entry, 1, *blur, "", keeps_last)
    arguments = (norm_weights, norm_biases, weights, biases, constants, filters, *plain)
    output, *kept = stem_operators.run_stem.forward_operator(x, *arguments)
    backward = ([torch.randn_like(output)], [x], kept, True, [i != 0 for i in range(convolutions)], *arguments)
    torch.library.opcheck(
        stem_operators.run_stem.backward_operator, backward, test_utils=("test_schema", "test_faketensor")
    )
    for leaf in (x, *norm_weights, *norm_biases, *weights, *biases):
        leaf.requires_grad_()
    torch.library.opcheck(stem_operators.run_stem.forward_operator, (x, *arguments), test_utils=EVERY_CHECK)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_one_graph_with_one_operator_for_each_block_whatever_the_size(training):
    """Compiled once for static and once for dynamic sizes; more layers do not make a longer graph."""
    ordinary, efficient = pair(IMAGENET | {"block_config": (4, 3)}, training=training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(efficient, backend=counter, fullgraph=True)
    for shape in ((3, 19, 22), (3, 19, 22), (4, 24, 29), (5, 33, 30), (2, 40, 41)):
        actual = {k.replace("_orig_mod.", ""): v for k, v in training_step(compiled, images(*shape)).items()}
        assert_close(actual, training_step(ordinary, images(*shape)))
    assert counter.frame_count == 2
    calls = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert len([call for call in calls if "stage_forward" in call]) == 2
    assert len([call for call in calls if "stem_forward" in call]) == 1


def test_compiled_dropout_draws_new_masks():
    _, network = pair(BOTTLENECK | {"drop_rate": 0.5})
    compiled, x = torch.compile(network, backend="aot_eager", fullgraph=True), images()
    first, second = (training_step(compiled, x)["output"] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("arguments", [BOTTLENECK, IMAGENET], ids=["bottleneck", "imagenet stem"])
def test_onnx(arguments):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ordinary, efficient = pair(arguments, training=False, dtype=torch.float32)
    x, file = images(dtype=torch.float32), io.BytesIO()
    torch.onnx.export(efficient, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close({"output": torch.from_numpy(actual)}, {"output": ordinary(x).detach()})


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_torch_fx(training):
    ordinary, efficient = pair(IMAGENET, training=training)
    traced = torch.fx.symbolic_trace(efficient)
    assert_close(training_step(traced, images()), training_step(ordinary, images()))


def test_state_dicts_fit_every_form():
    forms = [False, "recompute", True]
    for source in forms:
        state = DenseNet(**IMAGENET, efficient=source).state_dict()
        for target in forms:
            for keep in KEEP:
                network = DenseNet(**IMAGENET, efficient=target, keep=keep)
                network.load_state_dict(state, strict=True)
                assert list(network.state_dict()) == list(state)


def silu(network):
    network.features.denseblock1.denselayer1.relu1 = torch.nn.SiLU()


def hook_inside(network):
    network.features.denseblock1.denselayer2.conv1.register_forward_hook(lambda _m, _i, output: output + 1)


def hook_on_a_block(network):
    network.features.denseblock1.register_forward_hook(lambda _m, _i, output: output + 1)


@pytest.mark.parametrize("change", [silu, hook_inside, hook_on_a_block])
def test_a_compiled_network_is_what_it_was_when_it_was_compiled(change):
    """Changed without a call in between."""
    ordinary, efficient = pair(BOTTLENECK, change=change)
    actual = training_step(torch.compile(efficient, backend="aot_eager", fullgraph=True), images())
    assert_close({k.replace("_orig_mod.", ""): v for k, v in actual.items()}, training_step(ordinary, images()))


def test_a_compiled_network_is_compiled_anew_when_a_part_is_replaced():
    ordinary, efficient = pair(BOTTLENECK)
    compiled = torch.compile(efficient, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        actual = training_step(compiled, images())
        assert_close({k.replace("_orig_mod.", ""): v for k, v in actual.items()}, training_step(ordinary, images()))
        for network in (ordinary, efficient):
            silu(network)


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_memory_that_is_given_back_is_not_read(keep, dtype):
    _, efficient = pair(BOTTLENECK, keep, dtype=dtype)
    layer = efficient.features.denseblock1.denselayer2
    for module in (layer.conv1, layer.norm2, efficient.features.transition1.conv):
        output = efficient(images(dtype=dtype))
        size = module.weight.untyped_storage().nbytes()
        module.weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="cannot take a tensor without memory"):
            output.sum().backward()
        module.weight.untyped_storage().resize_(size)


@pytest.mark.parametrize("gradients", [True, False])
def test_operators_refuse_tangents(gradients):
    x, *others = stage_arguments(2, 2, "bottleneck", requires_grad=gradients)
    packed = stage_operators.run_stage.forward_operator(x, *others)
    grad, need = torch.ones_like(packed[0]), [True] * len(others[2])
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(t, t.cos()) for t in (x, grad)]
        with pytest.raises((RuntimeError, NotImplementedError)):
            stage_operators.run_stage.forward_operator(dual[0], *others)
        with pytest.raises((RuntimeError, NotImplementedError)):
            stage_operators.run_stage.backward_operator(dual[1], None, packed, need, *others)
        with torch.no_grad(), pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            stage_operators.run_stage.forward_operator(dual[0], *others)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: stage_operators.run_stage.forward_operator(x, *others)[0], (x,), (x.cos(),))


@pytest.mark.parametrize("keep", KEEP)
def test_operators_are_counted_with_what_they_compute_again(keep):
    """Of two layers with bottlenecks on 4 channels and a transition: see `stage_arguments`."""
    from torch.utils.flop_counter import FlopCounterMode

    stage_operators.run_stage.count()
    x, *others = stage_arguments(2, 2, keep)
    pixels, pointwise, windowed, transition = 2 * 6 * 5, 6 * (4 + 7), 2 * 3 * 6 * 9, 5 * 10
    every = pointwise + windowed + transition
    with FlopCounterMode(display=False) as counter:
        output = stage_operators.run_stage.forward_operator(x, *others)[0]
        assert counter.get_total_flops() == 2 * pixels * every
        output.sum().backward()
    # The first bottleneck output is cheap to make again: it is never kept.
    again = {"bottleneck": 6 * 4, "features": pointwise, "inputs": pointwise + windowed}[keep]
    assert counter.get_total_flops() == 2 * pixels * (3 * every + again)


def cast_step(wanted, run):
    """The gradients of a float32 stage on bfloat16 activations, and what they are of."""
    x, *others = stage_arguments(2, 2, "bottleneck", biased=True)
    arguments = stage_operators.StageArguments(*[[t.float() for t in some] for some in others[:4]], *others[4:])
    constants = [t.float() for t in arguments.constants]
    weights = [w.to(memory_format=torch.channels_last) for w in arguments.weights]
    parameters = [[t.detach().requires_grad_() for t in some] for some in (*arguments[:2], weights, arguments.biases)]
    for weight, need in zip(parameters[2], wanted, strict=True):
        weight.requires_grad_(need)
    x = x.detach().to(torch.bfloat16).requires_grad_()
    run(x, stage_operators.StageArguments(*parameters, [], constants, *arguments[6:]))[
        0
    ].float().square().sum().backward()
    return [x.grad, *(t.grad for some in parameters for t in some)], [x, *(t for some in parameters for t in some)]


@pytest.mark.parametrize("wanted", [(True,) * 5, (True, False, True, False, True), (False,) * 5])
def test_weights_are_cast_together_as_one_by_one(wanted, monkeypatch):
    """One operation forward and one backward, the same bits, each gradient in its tensor's own type and layout."""
    counts = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (counts.append(len(of)), copy(to, of))[1])
    ours, leaves = cast_step(wanted, lambda x, given: stage_operators.run_stage(x, given, torch.bfloat16))
    assert counts == [10, 5 + sum(wanted)]
    one_by_one, _ = cast_step(
        wanted, lambda x, given: stage_operators.run_stage(x, operators.cast_one_by_one(given, torch.bfloat16))
    )
    for gradient, expected, leaf in zip(ours, one_by_one, leaves, strict=True):
        assert (gradient is None) == (expected is None) == (not leaf.requires_grad)
        if gradient is not None:
            assert torch.equal(gradient, expected)
            assert gradient.dtype == leaf.dtype and gradient.stride() == leaf.stride()


def test_what_watches_single_operations_sees_single_casts(monkeypatch):
    monkeypatch.setattr(torch, "_foreach_copy_", None)

    def run(x, arguments):
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            return stage_operators.run_stage(x, arguments, torch.bfloat16)

    gradients, leaves = cast_step((True,) * 5, run)
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]


def test_gradients_in_batches_of_cast_weights():
    def run(x, arguments):
        output = stage_operators.run_stage(x, arguments, torch.bfloat16)[0]
        batch = torch.eye(2, dtype=torch.bfloat16)[:, :, None, None, None].expand(2, *output.shape)
        (rows,) = torch.autograd.grad(output, arguments.weights[0], batch, retain_graph=True, is_grads_batched=True)
        for row, gradient in zip(rows, batch, strict=True):
            (expected,) = torch.autograd.grad(output, arguments.weights[0], gradient, retain_graph=True)
            assert torch.equal(row, expected) and row.dtype == torch.float32
        return [output]

    cast_step((True,) * 5, run)
