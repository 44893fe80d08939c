"""Names of weights in other libraries. `LAYOUTS` has them in the order in which they are tried."""

from vitfast.weights.layouts import facebook, hugging_face, timm, torchvision, vit_pytorch
from vitfast.weights.layouts.layout import Layout

LAYOUTS: tuple[Layout, ...] = (
    *hugging_face.LAYOUTS,
    *torchvision.LAYOUTS,
    *vit_pytorch.LAYOUTS,
    *facebook.LAYOUTS,
    *timm.LAYOUTS,
)
