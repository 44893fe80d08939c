"""Programmatic dependent launch: a kernel's programs are there before the kernel ahead of it on the stream has ended.

Between two kernels a GPU is idle for about a microsecond, and at the end of each some of it for longer. On Hopper and
newer the next kernel may begin as soon as all programs of this one have begun, where it was launched so; it then has to
wait for what it reads, by an instruction. Here each kernel waits before all else, so that nothing changes but when its
programs take their places: whatever a stream promises holds.

Unmeasured, and so off unless VITFAST_OVERLAP=1 is in the environment when vitfast is imported.
"""

import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

WANTED = os.environ.get("VITFAST_OVERLAP") == "1"
OVERLAP = tl.constexpr(WANTED)


@triton.jit
def after_kernel_before():
    """The first statement of every kernel: from here on it may read what the one before has written."""
    if OVERLAP and tl.target_info.cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


def overlaps(device: int) -> bool:
    """Whether kernels on this CUDA device are launched so."""
    return WANTED and device >= 0 and torch.cuda.get_device_capability(device) >= (9, 0)
