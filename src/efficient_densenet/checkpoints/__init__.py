"""DenseNets in files, whichever library wrote them: the network that a file's weights belong to, and `convert`."""

from efficient_densenet.checkpoints.convert import convert_file
from efficient_densenet.checkpoints.densenets import DenseNetFile, load_network, network_of, read_densenet
from efficient_densenet.weights.canonical import read_state_dict
from efficient_densenet.weights.dialects import DIALECTS
from efficient_densenet.weights.writing import write_state_dict

__all__ = [
    "DIALECTS",
    "DenseNetFile",
    "convert_file",
    "load_network",
    "network_of",
    "read_densenet",
    "read_state_dict",
    "write_state_dict",
]
