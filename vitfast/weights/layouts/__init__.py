"""Names of weights in other libraries. `LAYOUTS` has them in the order in which they are tried."""

from vitfast.weights.layouts import clip, facebook, google, hugging_face, mmpretrain, timm, torchvision, vit_pytorch
from vitfast.weights.layouts.layout import Layout

LAYOUTS: tuple[Layout, ...] = (
    *hugging_face.LAYOUTS,
    *clip.LAYOUTS,
    *google.LAYOUTS,
    *torchvision.LAYOUTS,
    *vit_pytorch.LAYOUTS,
    *facebook.LAYOUTS,
    *mmpretrain.LAYOUTS,
    *timm.LAYOUTS,
)
