"""The Triton kernels as compiled code, for devices that are not here: what they take, and that no product is overtaken.

``benchmarks/gpu.py --compile-only`` compiles every shape for every device; here are some shapes of each kind.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from efficient_densenet import densenet121, densenet161, densenet264, densenet_cifar

triton = pytest.importorskip("triton")
from efficient_densenet.ops.triton import ahead_of_time, estimate, forward, launch, machine_code  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Empty at first, and one for all tests, for several look at the same kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def shapes(*names):
    found = tuple(shape for shape in ahead_of_time.SHAPES if shape.name in names)
    assert len(found) == len(names)
    return found


def compiled(kernel, shape, kind, target):
    (launched,) = [one for _, one in ahead_of_time.distinct(target, shapes(shape), [kind]) if one.name == kernel]
    return launched.compile(target)


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "triton_kernels.json"
WIDE, NARROW = "transition, DenseNet-121", "3×3, k=12, C=24"


@pytest.mark.parametrize(
    ("target", "kinds", "names"),
    [
        ("sm_80", ("tf32",), (WIDE, NARROW)),
        ("sm_89", ("tf32",), (WIDE,)),
        ("sm_90", ("bf16",), (WIDE, NARROW, "bottleneck, DenseNet-121")),
        ("sm_100", ("bf16",), (WIDE,)),
        ("sm_120", ("bf16",), (WIDE,)),
        ("gfx90a", ("bf16",), (WIDE,)),
        ("gfx942", ("fp16",), (WIDE,)),
        ("gfx1100", ("bf16",), (WIDE,)),
    ],
)
def test_kernels_compile_for_devices_that_are_not_here(target, kinds, names):
    """Without spilling, with tensor cores, in the shared memory that there is."""
    found = [
        ahead_of_time.record(target, *launched) for launched in ahead_of_time.distinct(target, shapes(*names), kinds)
    ]
    missing = {*ahead_of_time.KERNELS} - {record["kernel"] for record in found}
    without_window = {"rectify_kernel"} if NARROW not in names else set()
    assert missing == without_window | ({"grad_x_pointwise_kernel"} if target != "sm_90" else set())
    assert not [fault for record in found for fault in ahead_of_time.faults(record)]


def test_a_kernel_that_spills_is_disassembled_once(monkeypatch):
    """For the loop that its spills may be in, and for what may overtake its products."""
    asked, tool = [], machine_code._tool
    monkeypatch.setattr(machine_code, "_tool", lambda name, *options: asked.append(name) or tool(name, *options))
    found = machine_code.describe(compiled("grad_x_kernel", WIDE, "bf16", "sm_90"))
    assert found["spilled_bytes"] and not found["spills_in_loop"]
    assert sorted(asked) == ["cuobjdump", "nvdisasm"]


def test_the_published_kernels_are_those_of_the_tiles_and_have_no_faults():
    """Whatever changes a tile or a constant compiles all kernels again: ``benchmarks/gpu.py --compile-only``."""
    content = json.loads(RESULTS.read_text())
    published = ahead_of_time.records_of(content["kernels"])
    assert ahead_of_time.tables(published) == content["kernels"]
    assert not [fault for record in published for fault in ahead_of_time.faults(record)]
    assert "dirty" not in content["commit"]
    expected = [
        ahead_of_time.asked_for(target, *one)
        for target in ahead_of_time.TARGETS
        for one in ahead_of_time.distinct(target, (*ahead_of_time.SHAPES, *ahead_of_time.FEW_PIXELS))
    ]
    for found, request in zip(published, ahead_of_time.records_of(ahead_of_time.tables(expected)), strict=True):
        assert {name: found[name] for name in request} | {"WAIT": None} == request | {"WAIT": None}  # that of Triton


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32"])
def test_no_product_is_overtaken_on_hopper(kind):
    """Every forward kernel: the left operand's registers stay as they are while a product may read them."""
    kernels = [one for _, one in ahead_of_time.distinct("sm_90", kinds=[kind]) if one.name == "norm_relu_conv_kernel"]
    found = [ahead_of_time.record("sm_90", kind, launched) for launched in kernels]
    assert len(found) >= 10 and all(record["tensor_cores"] for record in found)
    assert not [fault for record in found for fault in ahead_of_time.faults(record)]


def test_the_model_of_a_step_counts_what_kernels_move():
    """On Hopper, for a layer of DenseNet-121."""
    found = estimate.costs(shapes("bottleneck, DenseNet-121", "3×3, k=32"))
    pixels = 256 * 56 * 56
    expected = {
        "1×1 forward": 256 + 128,
        "1×1, gradient of the weight": 256 + 128,
        "1×1, gradient of the prefix": 3 * 256 + 128,
        "3×3 forward": 3 * 128 + 32,  # rectified, written and read again
        "3×3, gradient of the weight": 128 + 32,
        "3×3, gradient of the prefix": 2 * 128 + 32,
        "finishing bottleneck gradients": 3 * 128,
    }
    for part, values in expected.items():
        assert found[part].memory == pytest.approx(1e3 * pixels * values * 2 / estimate.MEMORY)
        assert found[part].cache > 0 and found[part].takes >= found[part].instructions > 0
    assert set(found) == set(expected)


@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9), reason="this Triton waits by itself")
def test_without_the_wait_products_are_overtaken_on_hopper(monkeypatch):
    """So that the test above can fail."""
    monkeypatch.setattr(forward, "_MUST_WAIT", False)
    code = compiled("norm_relu_conv_kernel", "bottleneck, DenseNet-121", "fp16", "sm_90")
    assert machine_code.describe(code)["overtaken"]


LISTING = """
        /*0000*/                   HGMMA.64x16x16.F32.BF16 R24, R88, gdesc[UR8], R24, gsb0 ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   {before} ;
        /*0030*/                   HGMMA.64x16x16.F32.BF16 R24, R92, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, {left} ;
        /*0050*/                   {behind} ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   LDS.128 R88, [R2] ;
        /*0090*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("before", "left", "behind", "overtaken"),
    [
        ("NOP", "0x1", "NOP", []),
        ("NOP", "0x1", "LDS.64 R88, [R2]", []),  # the older product, whose operand this was, is complete
        ("LDS.64 R90, [R2]", "0x1", "NOP", ["0020: LDS.64 R90, [R2]"]),  # the first time
        (
            "F2FP.BF16.F32.PACK_AB R92, R3, R4",
            "0x1",
            "NOP",
            ["0020: F2FP.BF16.F32.PACK_AB R92, R3, R4"],
        ),  # round the loop
        ("NOP", "0x1", "LDS.128 R90, [R2]", ["0050: LDS.128 R90, [R2]"]),  # its last two registers
        ("F2FP.BF16.F32.PACK_AB R92, R3, R4", "0x0", "LDS.128 R92, [R2]", []),
        ("STS.64 [R92], R94", "0x1", "ISETP.GE.AND P0, PT, R92, R3, PT", []),  # both read
    ],
)
def test_what_overtakes_a_product_is_found(before, left, behind, overtaken):
    listing = LISTING.format(before=before, left=left, behind=behind)
    assert machine_code.overtaken(listing) == overtaken


def test_scale_and_shift_are_loaded_sixteen_bytes_at_a_time():
    """Where they begin at multiples of sixteen bytes."""
    code = compiled("norm_relu_conv_kernel", "bottleneck, DenseNet-121", "bf16", "sm_80")
    # Or as many lanes as there are channels take four bytes each, at once: a copy for each vector and stage.
    assert code.asm["ptx"].count("], 0x4, ") <= 2 * 4
    vectors = torch.zeros(9)
    assert launch.aligned(vectors[:4], vectors[4:]) and not launch.aligned(vectors[:4], vectors[1:])


def test_a_product_and_a_sum_are_fused():
    code = compiled("finish_kernel", "3×3, k=12", "bf16", "sm_80")
    assert code.metadata.enable_fp_fusion and "fma.rn.f32" in code.asm["ptx"]


def test_one_compiled_kernel_for_all_layers():
    """Channel counts, strides, sizes and batches are run-time arguments; large layers differ in nothing else."""
    layers = [
        ahead_of_time.Shape("", images, (size, size), channels, 32, 3)
        for images, size, channels in [(256, 56, 128), (255, 56, 160), (33, 64, 992), (64, 59, 480)]
    ]
    assert len({frozenset(ahead_of_time.kernels_of(layer, "bf16")) for layer in layers}) == 1


@functools.cache
def known(kind):
    shapes = ahead_of_time.SHAPES + ahead_of_time.FEW_PIXELS
    return set().union(*(ahead_of_time.kernels_of(shape, kind) for shape in shapes))


@pytest.mark.parametrize(("kind", "images", "size"), [("bf16", 256, 56), ("bf16", 1, 8), ("tf32", 64, 32)])
@pytest.mark.parametrize(
    "network",
    [
        lambda: densenet_cifar(40, 12),
        lambda: densenet_cifar(100, 12, bottleneck=True),
        lambda: densenet_cifar(190, 40, bottleneck=True),
        densenet121,
        densenet161,
        densenet264,
    ],
)
def test_what_networks_use_is_among_what_is_compiled(network, kind, images, size):
    with torch.device("meta"):
        layers = ahead_of_time.shapes_of(network(), images, size)
    missing = {layer: names for layer in layers if (names := ahead_of_time.kernels_of(layer, kind) - known(kind))}
    assert not missing, sorted(layer.name for layer in missing)
