"""What has to be known of an op to check, compile and tune its kernel: one entry of a table.

`vitfast.warmup` and `vitfast tune` know no kernel by name. A new one joins both by an entry in `dispatch.KERNELS` and
one here for each torch op that may run it.
"""

from vitfast.check.families.attention import ATTENTION
from vitfast.check.families.family import Family, as_tuple, draw_all, present
from vitfast.check.families.layer_norm import LAYER_NORM
from vitfast.check.families.linear import LINEAR
from vitfast.check.families.mlp import MLP
from vitfast.check.families.patch_embed import PATCH_EMBED
from vitfast.check.families.prepared_block import PREPARED_BLOCK

__all__ = ["FAMILIES", "Family", "as_tuple", "draw_all", "present"]

# by the name of the torch op
FAMILIES: dict[str, Family] = {**ATTENTION, **LAYER_NORM, **LINEAR, **MLP, **PATCH_EMBED, **PREPARED_BLOCK}
