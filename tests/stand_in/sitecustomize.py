"""Every Python that finds this folder on its path takes the CPU for a GPU: see `stand_in_gpu`."""

import stand_in_gpu

stand_in_gpu.install()
