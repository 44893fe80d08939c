"""What `load` found, assumed, passed over and changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vitfast.config import ViTConfig
from vitfast.timm_names import pretrained_cfg as cfgs


@dataclass(frozen=True)
class LoadReport:
    """Attributes:
    source: the path, or the class of a live model.
    layout: its name, such as 'hf-vit'; whose: the library; why: by what it was recognised.
    prefix: what stood before the names.
    config: of the weights as they were, before anything was changed.
    assumed: field -> why, of what neither weights nor files beside them tell.
    ignored: name of a weight -> what it is.
    changed: what differs from the weights: classifier, channels, positions.
    preprocessing: of images, in timm's terms; empty where nobody knows.
    labels: class -> name.
    chosen: which of several sets of weights these are.
    not_finite: weights with NaN or Inf.
    """

    source: str
    layout: str
    whose: str
    why: str
    prefix: str
    config: ViTConfig
    assumed: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    preprocessing: dict[str, Any] = field(default_factory=dict)
    labels: dict[int, str] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()
    chosen: str = ""

    def pretrained_cfg(self, config: ViTConfig) -> dict[str, Any]:
        """timm's entries for a model of this config, which its tools read."""
        size = {"input_size": (config.channels, *config.image_size)}  # type: ignore[misc]  # a pair
        names = {"first_conv": "patch_embed.proj", "classifier": "head"}
        labels = {"label_names": tuple(self.labels.values())} if self.labels else {}
        return cfgs.DEFAULTS | names | self.preprocessing | size | {"num_classes": config.num_classes} | labels

    def __str__(self) -> str:
        under = f", under {self.prefix!r}" if self.prefix else ""
        lines = [f"{self.source}: weights of {self.whose} ({self.layout}): {self.why}{under}"]
        lines += [f"  {self.chosen}"] if self.chosen else []
        value = lambda name: getattr(self.config, name, self.preprocessing)  # noqa: E731
        lines += [f"  assumed {name} = {value(name)!r}: {why}" for name, why in self.assumed.items()]
        lines += [f"  passed over {count} of {what}" for what, count in Counter(self.ignored.values()).items()]
        lines += [f"  {change}" for change in self.changed]
        lines += [f"  images: {', '.join(f'{k} {v}' for k, v in self.preprocessing.items()) or 'not known'}"]
        if self.labels:
            lines.append(f"  {len(self.labels)} labels, the first {next(iter(self.labels.values()))!r}")
        if self.not_finite:
            lines.append(f"  NaN or Inf in {', '.join(self.not_finite)}")
        return "\n".join(lines)
