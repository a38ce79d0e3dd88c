"""The native CPU kernels, and wheels that hold them. Everything else about the package is in pyproject.toml."""

import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = "src/efficient_densenet/ops/cpu"
KERNELS = Extension(
    "efficient_densenet.ops.cpu._kernels",
    sources=sorted(glob(f"{FOLDER}/*.cpp")),
    depends=glob(f"{FOLDER}/*.h"),
    extra_compile_args=[
        "-O3",
        "-g0",
        "-std=c++17",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
    ],
    optional=True,  # without a compiler, plain PyTorch runs in their place, and says so
)


class PlainLibrary(build_ext):
    """Leave the interpreter out of the file's name: the kernels use nothing of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"


class WheelForEveryPython(bdist_wheel):
    """One wheel for each platform, ``py3-none-PLATFORM``; on Windows too, whose wheel has no kernels."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # The kernels are written with vectors that only GCC and Clang know.
    ext_modules=[] if sys.platform == "win32" else [KERNELS],
    cmdclass={"build_ext": PlainLibrary, "bdist_wheel": WheelForEveryPython},
)
