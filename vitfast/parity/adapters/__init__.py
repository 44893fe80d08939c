"""How to run the models of each library stage by stage. `ADAPTERS` has them by the name of the class."""

from vitfast.parity.adapters import hugging_face, own, timm, torchvision, vit_pytorch
from vitfast.parity.adapters.adapter import Adapter

ADAPTERS: dict[str, Adapter] = {
    **own.ADAPTERS, **timm.ADAPTERS, **hugging_face.ADAPTERS, **torchvision.ADAPTERS, **vit_pytorch.ADAPTERS,
}  # fmt: skip
