"""The named networks, as configuration files can name them: ``network: densenet121``, with their arguments below it.

jsonargparse links values of the data (classes, channels) to the arguments of classes, not of functions. So each
variant gets a class of the same name here, whose construction calls the function and returns its `DenseNet`.
"""

from __future__ import annotations

from jsonargparse import class_from_function

from efficient_densenet.models.densenet import DenseNet
from efficient_densenet.models.variants import VARIANTS

for _name, _function in VARIANTS.items():
    class_from_function(_function, DenseNet, name=_name)  # puts the class into this module
