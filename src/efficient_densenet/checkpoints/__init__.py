"""Weights of DenseNets in files, whichever library wrote them."""

from efficient_densenet.checkpoints.convert import convert_file
from efficient_densenet.checkpoints.densenets import DenseNetFile, load_network, read_densenet
from efficient_densenet.checkpoints.dialects import DIALECTS
from efficient_densenet.checkpoints.files import read_state_dict, write_state_dict

__all__ = [
    "DIALECTS",
    "DenseNetFile",
    "convert_file",
    "load_network",
    "read_densenet",
    "read_state_dict",
    "write_state_dict",
]
