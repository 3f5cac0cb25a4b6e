// Table of contents of sage_core._native.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void register_mechanism(py::module_& m);
void register_policies(py::module_& m);
namespace sage {
void register_baselines(py::module_& m);
void register_iteration(py::module_& m);
void register_engine(py::module_& m);
void register_predict(py::module_& m);
void register_plane(py::module_& m);
void register_loop(py::module_& m);
void register_recorder(py::module_& m);
void register_relay(py::module_& m);
void register_stepper(py::module_& m);
}  // namespace sage

PYBIND11_MODULE(_native, m) {
  m.doc() =
      "Native operators of SAGE: the control plane with its mechanism and scorers, the simulated engine, the event "
      "loop, the relay of streamed answers.";
  m.attr("build") = SAGE_NATIVE_BUILD;
  register_mechanism(m);
  register_policies(m);
  sage::register_baselines(m);
  sage::register_iteration(m);
  sage::register_engine(m);
  sage::register_predict(m);
  sage::register_plane(m);
  sage::register_loop(m);
  sage::register_recorder(m);
  sage::register_relay(m);
  sage::register_stepper(m);
}
