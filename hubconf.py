"""For `torch.hub`: ``torch.hub.load("OWNER/REPOSITORY", "densenet121", weights="DEFAULT", efficient=True)``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))  # torch.hub fetches the repository and installs nothing

from efficient_densenet import (  # noqa: F401
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_cifar,
)

dependencies = ["torch"]
