// Python's view of a plane in real time: steps the plane, chains the log, tells the recorder, all in one crossing. The
// meaning is sage_core/stepper.py.
#include <pybind11/pybind11.h>

#include <memory>

#include "sage/log.hpp"
#include "sage/plane.hpp"
#include "sage/recorder.hpp"

namespace py = pybind11;

namespace sage {
namespace {

struct Stepper {
  py::object plane_kept, record_kept;
  Plane* plane;
  Recorder* record;
  Chain chain;
  std::vector<Command> commands;
  std::string encoded;
};

}  // namespace

void register_stepper(py::module_& m) {
  py::class_<Stepper>(m, "Stepper", "One logged step after another; its meaning is sage_core.stepper.Stepper.")
      .def(py::init([](const py::object& plane, const py::object& record) {
             return std::make_unique<Stepper>(Stepper{plane,
                                                      record,
                                                      &py::cast<Plane&>(plane),
                                                      record.is_none() ? nullptr : &py::cast<Recorder&>(record),
                                                      {},
                                                      {},
                                                      {}});
           }),
           py::arg("plane"), py::arg("record"))
      .def(
          "step",
          [](Stepper& self, std::int64_t now, std::string_view events) {
            const std::vector<Event> happened = decode_events(events);
            self.commands.clear();
            self.plane->step(now, happened, self.commands);
            const Digest& digest = self.chain.step(now, events, self.commands);
            if (self.record) self.record->step(now, happened, self.commands, events, digest);
            self.encoded.clear();
            encode(self.commands, self.encoded);
            return py::bytes(self.encoded);
          },
          py::arg("now"), py::arg("events"))
      .def_property_readonly("full", [](const Stepper& self) { return self.record && self.record->full(); })
      .def_property_readonly("digest", [](const Stepper& self) {
        const Digest& digest = self.chain.digest();
        return py::bytes(digest.data(), digest.size());
      });
}

}  // namespace sage
