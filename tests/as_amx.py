"""A plugin: on any CPU, the tests take the ways that one with AMX takes. `python -m pytest -p tests.as_amx`

The kernels of plain tiles pass for those of AMX, and torch says that oneDNN has AMX: for a test that passes on the CPUs
of its author and fails on those with AMX. Products are slow so, and the clock chooses stock mostly.
"""

import torch

from tests.cpu_with_amx import PassedOff
from vitfast.kernels import extension


def pytest_configure(config):
    module, why = extension.load()
    if module is None:
        raise RuntimeError(f"as_amx: {why}")
    usable, capabilities = module.usable_kernels(), torch.cpu.get_capabilities() | {"amx_bf16": True}
    if usable[-1].name == "amx_bf16":
        return
    (plain_tiles,) = (kernels for kernels in usable if kernels.name == "plain_tiles")
    module.usable_kernels = lambda: [*usable, PassedOff(plain_tiles)]
    torch.cpu.get_capabilities = lambda: capabilities


def pytest_collection_modifyitems(config, items):
    # programs of C++ for each usable set of instructions
    executes = [item for item in items if item.path.stem == "test_native" and item.name.endswith("amx_bf16]")]
    config.hook.pytest_deselected(items=executes)
    items[:] = [item for item in items if item not in executes]
