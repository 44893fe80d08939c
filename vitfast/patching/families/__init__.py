"""What vitfast knows of the blocks of other libraries: a module each, which says it to `vitfast.patching.known`."""

from vitfast.patching.families import hugging_face as hugging_face
from vitfast.patching.families import timm as timm
from vitfast.patching.families import torchvision as torchvision
from vitfast.patching.families import vit_pytorch as vit_pytorch
