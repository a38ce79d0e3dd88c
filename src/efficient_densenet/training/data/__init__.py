"""Images for training and evaluation, as Lightning data modules."""

from efficient_densenet.training.data.base import ImageDataModule
from efficient_densenet.training.data.cifar import CIFAR10, CIFAR100
from efficient_densenet.training.data.digits import Digits
from efficient_densenet.training.data.folder import ImageFolder
from efficient_densenet.training.data.imagenet import ImageNet
from efficient_densenet.training.data.preprocessing import Preprocessing
from efficient_densenet.training.data.table import ImageTable

__all__ = ["CIFAR10", "CIFAR100", "Digits", "ImageDataModule", "ImageFolder", "ImageNet", "ImageTable", "Preprocessing"]
