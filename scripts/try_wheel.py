"""What somebody does first with an installed wheel; fails where the kernels are missing or the model is not converted.

Run it outside the repository, in an environment that has the wheel and torchvision.
"""

import sys
from pathlib import Path

import torch
import torchvision

import efficient_densenet
from efficient_densenet import make_efficient, report

assert Path(efficient_densenet.__file__).is_relative_to(sys.prefix), "this is not the installed package"
print(efficient_densenet.backends())
assert sys.platform == "win32" or "_kernels.so" in efficient_densenet.backends()["cpu"]

model = make_efficient(torchvision.models.densenet121())
print(report(model))
assert "shared buffer" in str(report(model))
model(torch.randn(2, 3, 64, 64)).sum().backward()
