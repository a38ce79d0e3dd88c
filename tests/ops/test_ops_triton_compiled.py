"""The Triton kernels as compiled code, for devices that are not here: what they take, and that no product is overtaken.

``benchmarks/gpu.py --compile-only`` compiles every shape for every device; here are some shapes of each kind.
"""

from __future__ import annotations

import pytest
import torch

from efficient_densenet import densenet121, densenet161, densenet264, densenet_cifar
from efficient_densenet.ops.triton import launch

triton = pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch, request, tmp_path):
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def shapes(*names):
    import gpu_compiled

    found = tuple(shape for shape in gpu_compiled.SHAPES if shape.name in names)
    assert len(found) == len(names)
    return found


def compiled(kernel, shape, kind, target):
    import gpu_compiled

    (launched,) = [one for _, one in gpu_compiled.distinct(target, shapes(shape), [kind]) if one.name == kernel]
    return launched.compile(target)


WIDE, NARROW = "transition, DenseNet-121", "3×3, k=12, C=24"


@pytest.mark.parametrize(
    ("target", "kinds", "names"),
    [
        ("sm_80", ("tf32",), (WIDE, NARROW)),
        ("sm_89", ("tf32",), (WIDE,)),
        ("sm_90", ("bf16",), (WIDE, NARROW)),
        ("sm_100", ("bf16",), (WIDE,)),
        ("sm_120", ("bf16",), (WIDE,)),
        ("gfx90a", ("bf16",), (WIDE,)),
        ("gfx942", ("fp16",), (WIDE,)),
        ("gfx1100", ("bf16",), (WIDE,)),
    ],
)
def test_kernels_compile_for_devices_that_are_not_here(target, kinds, names):
    """Without spilling, with tensor cores, in the shared memory that there is."""
    import gpu_compiled

    found = [
        gpu_compiled.record(target, *launched) for launched in gpu_compiled.distinct(target, shapes(*names), kinds)
    ]
    assert {record["kernel"] for record in found} == set(gpu_compiled.KERNELS)
    assert not [fault for record in found for fault in gpu_compiled.faults(record)], gpu_compiled.table(found)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32"])
def test_no_product_is_overtaken_on_hopper(kind):
    """Every forward kernel: the left operand's registers stay as they are while a product may read them."""
    import gpu_compiled

    forward = [one for _, one in gpu_compiled.distinct("sm_90", kinds=[kind]) if one.name == "norm_relu_conv_kernel"]
    found = [gpu_compiled.record("sm_90", kind, launched) for launched in forward]
    assert len(found) >= 10 and all(record["tensor_cores"] for record in found)
    assert not [fault for record in found for fault in gpu_compiled.faults(record)]


@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9), reason="this Triton waits by itself")
def test_without_the_wait_products_are_overtaken_on_hopper(monkeypatch):
    """So that the test above can fail."""
    import gpu_machine_code

    from efficient_densenet.ops.triton import forward

    monkeypatch.setattr(forward, "_MUST_WAIT", False)
    code = compiled("norm_relu_conv_kernel", "bottleneck, DenseNet-121", "fp16", "sm_90")
    assert gpu_machine_code.describe(code)["overtaken"]


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
    import gpu_machine_code

    listing = LISTING.format(before=before, left=left, behind=behind)
    assert gpu_machine_code.overtaken(listing) == overtaken


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
    """Channel counts, strides, sizes and batches are run-time arguments; layers differ in nothing else."""
    import gpu_compiled

    layers = [
        gpu_compiled.Shape("", images, (size, size), channels, 32, 3)
        for images, size, channels in [(256, 56, 128), (255, 56, 160), (1, 7, 992), (64, 29, 480)]
    ]
    assert len({frozenset(gpu_compiled.kernels_of(layer, "bf16")) for layer in layers}) == 1


@pytest.mark.parametrize("kind", ["bf16", "tf32"])
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
def test_what_networks_use_is_among_what_is_compiled(network, kind):
    import gpu_compiled

    known = set().union(*(gpu_compiled.kernels_of(shape, kind) for shape in gpu_compiled.SHAPES))
    with torch.device("meta"):
        layers = gpu_compiled.shapes_of(network())
    missing = {layer: names for layer in layers if (names := gpu_compiled.kernels_of(layer, kind) - known)}
    assert not missing, sorted(layer.name for layer in missing)
