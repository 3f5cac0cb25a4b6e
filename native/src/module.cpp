// Table of contents of sage_core._native.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void register_mechanism(py::module_& m);
void register_policies(py::module_& m);
namespace sage {
void register_engine(py::module_& m);
}

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native operators of SAGE: the scheduling mechanism, policy scorers and the simulated engine.";
  m.attr("build") = SAGE_NATIVE_BUILD;
  register_mechanism(m);
  register_policies(m);
  sage::register_engine(m);
}
