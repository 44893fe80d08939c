#pragma once

#include <pybind11/pybind11.h>

// Adds the kernels for GPUs to a module.
void bind_cuda(pybind11::module_& m);
