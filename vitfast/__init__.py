"""vitfast: Vision Transformers on kernels of their own.

    vitfast.ViT(image_size=..., ...)    vit-pytorch's signature and architecture
    vitfast.create_model(name, ...)     timm's names and keywords
    vitfast.ViT.from_config(config)     any ViTConfig
    vitfast.load(source)                weights of any library's ViT, from files, folders or a model in memory
    vitfast.patch(model)                timm's, Hugging Face's, torchvision's or vit-pytorch's model on vitfast's ops
    vitfast.compare(a, b, images)       two models stage by stage: where they differ, and why
    vitfast.prepare(model)              frozen, packed, for inference
    vitfast.warmup(model, batch)        check and compile a GPU's kernels, before the first image

Importing needs neither a GPU nor triton, and asks no device anything.
"""

from vitfast import ops, reference
from vitfast.check.warmup import warmup
from vitfast.checkpoints.checkpoint import read_checkpoint, read_config, save_checkpoint
from vitfast.choose.dispatch import backend, set_backend
from vitfast.choose.exportable import set_exportable
from vitfast.config import ViTConfig
from vitfast.inference.prepare import prepare
from vitfast.loading.convert import convert, save_as
from vitfast.loading.create import create_model
from vitfast.loading.into_model import load_checkpoint
from vitfast.loading.load import load
from vitfast.model.vit import ViT
from vitfast.parity.compare import compare
from vitfast.patching.explain import explain
from vitfast.patching.patch import patch, patched, unpatch
from vitfast.timm_names.variants import UNSUPPORTED, VARIANTS, config_for, list_models
from vitfast.version import __version__ as __version__

__all__ = [
    "UNSUPPORTED", "VARIANTS", "ViT", "ViTConfig", "backend", "compare", "config_for", "convert", "create_model",
    "explain", "list_models", "load", "load_checkpoint", "ops", "patch", "patched", "prepare", "read_checkpoint",
    "read_config", "reference", "save_as", "save_checkpoint", "set_backend", "set_exportable", "unpatch", "warmup",
]  # fmt: skip
