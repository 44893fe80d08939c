// Python's view of the extension. No torch header anywhere in csrc: it builds without torch and survives its upgrades.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu_features.h"
#ifdef VITFAST_CUDA
#include "cuda_probe.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of vitfast; use it through the package.";
  m.def("cpu_features", &vitfast::cpu_features, "Instruction set -> usable on this machine.");
#ifdef VITFAST_CUDA
  m.def(
      "probe_cuda",
      [] {
        vitfast::CudaProbe probe;
        {
          py::gil_scoped_release release;
          probe = vitfast::probe_cuda();
        }
        py::dict result;
        result["driver_version"] = probe.driver_version;
        result["runtime_version"] = probe.runtime_version;
        result["error"] = probe.error;
        result["error_text"] = probe.error_text;
        result["devices"] = probe.devices;
        return result;
      },
      "Versions, devices and the error of the CUDA runtime that this extension was built with.");
#endif
}
