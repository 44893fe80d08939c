"""What CUDA graphs of prepared models hold of memory, counted without a GPU: which tensors are alive at once.

Counted are tensors that operators give, on the way of the five kernels a block in bf16. What a kernel takes for itself
(statistics of rows, split sums) is not, nor is what torch's allocator rounds up and CUDA keeps for a graph.
"""

import torch
from fake_graphs import tensors
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast
from vitfast.inference.graphs import LARGEST_BATCH, bucket
from vitfast.inference.prepare import PreparedViT

MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
BATCHES = (1, 8, 64, 256)


class Alive(TorchDispatchMode):
    """The most bytes that were alive at once of what was made in here."""

    def __init__(self):
        super().__init__()
        self.most, self.known = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(t.untyped_storage()) for t in tensors(args)}
        made = {StorageWeakRef(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors(found)}
        self.known |= {storage: size for storage, size in made.items() if storage not in given}
        self.known = {storage: size for storage, size in self.known.items() if not storage.expired()}
        self.most = max(self.most, sum(self.known.values()))
        return found


def prepared(name):
    with torch.device("meta"):
        model = vitfast.create_model(name).eval().bfloat16()
    return PreparedViT(model, torch.bfloat16, None)


@torch.no_grad()
def counted(model, batch):
    """Bytes of (images, all else at its most, result) of one graph."""
    images = torch.empty(batch, 3, *model.config.image_size, dtype=torch.bfloat16, device="meta")
    with Alive() as alive:
        result = model._forward(images)
    return images.nbytes, alive.most, result.nbytes


def row(name):
    """MiB of one graph for each of BATCHES, and of all graphs: captured from the largest down, and at worst."""
    model, mib = prepared(name), 2.0**20
    buckets = sorted({bucket(n) for n in range(1, LARGEST_BATCH + 1)})
    found = {n: counted(model, n) for n in buckets}
    images, most, _ = found[LARGEST_BATCH]
    down = images + most + sum(result for n, (_, _, result) in found.items() if n != LARGEST_BATCH)
    return [sum(found[n][:2]) / mib for n in BATCHES] + [down / mib, sum(a + b for a, b, _ in found.values()) / mib]


def table():
    """The lines of docs/inference.md."""
    buckets = len({bucket(n) for n in range(1, LARGEST_BATCH + 1)})
    heads = ["MiB", *(f"{n} image{'s' * (n > 1)}" for n in BATCHES), f"all {buckets}, from the largest", "at worst"]
    lines = [heads, ["---"] * len(heads)]
    for name in MODELS:
        lines.append([name, *(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in row(name))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table())
