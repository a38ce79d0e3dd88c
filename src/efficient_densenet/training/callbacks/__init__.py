"""What happens around epochs and batches."""

from efficient_densenet.training.callbacks.epochs import EpochSeed, EpochTable
from efficient_densenet.training.callbacks.learning_rate import FindLearningRate
from efficient_densenet.training.callbacks.memory import OutOfMemory, WithinMemory
from efficient_densenet.training.callbacks.preparation import NetworkFirst
from efficient_densenet.training.callbacks.results import Announcement, Figures
from efficient_densenet.training.callbacks.throughput import Throughput

__all__ = [
    "Announcement",
    "EpochSeed",
    "EpochTable",
    "Figures",
    "FindLearningRate",
    "NetworkFirst",
    "OutOfMemory",
    "Throughput",
    "WithinMemory",
]
