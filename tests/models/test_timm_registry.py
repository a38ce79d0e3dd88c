"""The networks under timm's names, whichever of the two packages is imported first."""

from __future__ import annotations

import subprocess
import sys

FIRST = ("timm", "efficient_densenet", "timm.layers")
USE = """
import timm, torch, efficient_densenet
from timm.data import resolve_data_config
model = timm.create_model("efficient_densenet121", num_classes=5, in_chans=1, proj_drop_rate=0.1, drop_path_rate=None)
assert isinstance(model, efficient_densenet.DenseNet) and model.efficient is True
assert model.num_classes == 5 and model.in_channels == 1
assert resolve_data_config({}, model=model)["input_size"] == (3, 224, 224)
assert "efficient_densenet201" in timm.list_models("efficient_*")
try:
    timm.create_model("efficient_densenet121", stem_type="deep")
except efficient_densenet.UserError as error:
    assert "stem_type" in str(error)
else:
    raise AssertionError
"""


# Each order in a fork of a process that has imported what both packages need, for that takes seconds.
EACH = """
import importlib, os, sys, torchvision
first, use = sys.argv[1:]
for name in first.split():
    if os.fork() == 0:
        importlib.import_module(name)
        exec(use, {})
        os._exit(0)
    print(name, "ends with", os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_timm_knows_the_names_whatever_is_imported_first():
    program = [sys.executable, "-W", "ignore", "-c", EACH, " ".join(FIRST), USE]
    result = subprocess.run(program, capture_output=True, text=True)
    assert result.stdout.splitlines() == [f"{name} ends with 0" for name in FIRST], result.stderr


def test_importing_the_package_does_not_import_timm():
    code = "import sys, efficient_densenet; assert not {'timm', 'torchvision', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
