"""vitfast: Vision Transformers on kernels of their own.

    vitfast.ViT(image_size=..., ...)    vit-pytorch's signature and architecture
    vitfast.create_model(name, ...)     timm's names and keywords
    vitfast.ViT.from_config(config)     any ViTConfig
    vitfast.prepare(model)              frozen, packed, for inference
    vitfast.warmup(model, batch)        check and compile a GPU's kernels, before the first image

Importing needs neither a GPU nor triton, and asks no device anything.
"""

from vitfast import ops, reference
from vitfast.config import ViTConfig
from vitfast.create import create_model
from vitfast.dispatch import backend, set_backend
from vitfast.engine import prepare
from vitfast.fusion import explain
from vitfast.switches import set_exportable
from vitfast.variants import UNSUPPORTED, VARIANTS, config_for, list_models
from vitfast.vit import ViT
from vitfast.warm_up import warmup
from vitfast.weights.checkpoint import load_checkpoint, read_checkpoint, read_config, save_checkpoint

__version__ = "0.1.0"

__all__ = [
    "UNSUPPORTED", "VARIANTS", "ViT", "ViTConfig", "backend", "config_for", "create_model", "explain", "list_models",
    "load_checkpoint", "ops", "prepare",
    "read_checkpoint", "read_config", "reference", "save_checkpoint", "set_backend", "set_exportable", "warmup",
]  # fmt: skip
