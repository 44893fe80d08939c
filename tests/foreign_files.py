"""What tests of other libraries' files share: a small model, what stands beside its weights, and how to read it."""

import argparse
import enum
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import vitfast

NAME, SMALL = "vit_tiny_patch16_224", dict(img_size=32, depth=2, num_classes=5)


def build():
    return vitfast.create_model(NAME, **SMALL).eval()


def assert_loaded(model, expected):
    """The same weights, and what they compute."""
    state = model.state_dict()
    assert list(state) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert torch.equal(state[key], value), key
    images = torch.randn(2, 3, *expected.config.image_size)
    assert torch.equal(model.eval()(images), expected.eval()(images))


def read(path, **how):
    return vitfast.load_checkpoint(build(), path, allow_pickle=True, **how)


class Stage(enum.Enum):
    WARM = "warm"


@dataclass
class Recipe:
    """A config of the user's own, which whoever reads the weights need not have."""

    rate: float = 0.1


class Attributes(dict):
    pass


Attributes.__qualname__ = Attributes.__name__ = "AttributeDict"
AttributeDict = Attributes


class CfgNode(dict):
    """As yacs names it; with what it says about itself."""

    def __init__(self, **items):
        super().__init__(items)
        self.frozen = True


class Rates(list):
    pass


class Ordered(OrderedDict):
    pass


class Labels(torch.Tensor):
    pass


def settings():
    return argparse.Namespace(
        model=NAME, output=Path("/runs/1"), stages={Stage.WARM}, mean=np.float32(0.5), recipe=Recipe(), lrs=(1e-3, 0),
        extra=AttributeDict(a=1, b=[Recipe()]), counts=defaultdict(list, {"a": [1]}), crop=np.arange(3),
        node=CfgNode(a=CfgNode(b=1)), rates=Rates([0.1]), ordered=Ordered(a=1), last=deque([1, 2], maxlen=3),
        labels=torch.ones(2).as_subclass(Labels), sparse=torch.eye(2).to_sparse(),
    )  # fmt: skip


def unwrapped_of(prefix, inside=""):
    """As the wrapper names them: `prefix` before all keys, `inside` after each block's number."""

    def content(model):
        names = {k: prefix + k.replace("blocks.1.", f"blocks.1.{inside}") for k in model.state_dict()}
        return OrderedDict((names[key], value) for key, value in model.state_dict().items())

    return content
