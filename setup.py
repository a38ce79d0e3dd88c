"""The native CPU kernels. Everything else about the package is in pyproject.toml."""

import sys
from glob import glob

from setuptools import Extension, setup

KERNELS = Extension(
    "efficient_densenet.ops.cpu._kernels",
    sources=sorted(glob("src/efficient_densenet/ops/cpu/*.cpp")),
    depends=glob("src/efficient_densenet/ops/cpu/*.h"),
    extra_compile_args=["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"],
    optional=True,  # without a compiler, plain PyTorch runs in their place, and says so
)

# The kernels are written with vectors that only GCC and Clang know.
setup(ext_modules=[] if sys.platform == "win32" else [KERNELS])
