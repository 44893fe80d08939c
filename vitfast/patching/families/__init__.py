"""What vitfast knows of the blocks of other libraries: a module each, which says it to `vitfast.patching.known`."""

from vitfast.patching.families import timm as timm
