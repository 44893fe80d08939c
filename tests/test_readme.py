"""The README's examples, as a reader would paste them."""

import re
from pathlib import Path

import pytest
import torch
import vit_pytorch

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("i", range(6))
def test_example_does_not_run(i, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = dict(image_size=224, patch_size=16, num_classes=10, dim=384, depth=6, heads=6, mlp_dim=1536)
    torch.save(vit_pytorch.ViT(**size).state_dict(), "old.pt")
    assert len(EXAMPLES) == 6
    exec(compile(EXAMPLES[i], f"README.md, example {i}", "exec"), {})


def test_named_file_does_not_exist():
    for path in re.findall(r"`((?:vitfast|benchmarks|tests)/[\w/.]+)`", README):
        assert (Path(__file__).parent.parent / path).exists(), path
