"""What has to be known of an op to check, compile and tune its kernel: one entry of a table.

`vitfast.warmup` and `vitfast tune` know no kernel by name. A new one joins both by an entry in `dispatch.KERNELS` and
one here for each torch op that may run it.
"""

from vitfast.families.attention import ATTENTION
from vitfast.families.family import Family, as_tuple, draw_all, present
from vitfast.families.layers import LAYERS
from vitfast.families.patches import PATCHES

__all__ = ["FAMILIES", "Family", "as_tuple", "draw_all", "present"]

# by the name of the torch op
FAMILIES: dict[str, Family] = {**ATTENTION, **LAYERS, **PATCHES}
