// Python's view of the plane. Events and commands cross as MessagePack, the encoding of the log.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <map>

#include "sage/bind.hpp"
#include "sage/errors.hpp"
#include "sage/log.hpp"
#include "sage/plane.hpp"

namespace py = pybind11;

namespace sage {
namespace {

py::object reference(const char* name) { return py::module_::import("sage_core.reference").attr(name); }

std::string name_of(const py::object& part) { return py::cast<std::string>(reference("part_name")(part)); }

class PythonPredict : public Predict {
 public:
  explicit PythonPredict(py::object part) : part_(std::move(part)) {}
  std::int64_t predict(std::int64_t request, Label tenant, std::int64_t kind, std::int64_t input_tokens,
                       std::int64_t most) override {
    const py::object answer = part_.attr("predict")(request, *tenant, kind, input_tokens, most);
    static py::object* checked = new py::object(py::module_::import("sage_core.plane").attr("checked_prediction"));
    return py::cast<std::int64_t>((*checked)(part_, answer));
  }
  void observe(Label tenant, std::int64_t kind, std::int64_t output_tokens) override {
    part_.attr("observe")(*tenant, kind, output_tokens);
  }

 private:
  py::object part_;
};

class PythonAdmit : public Admit {
 public:
  explicit PythonAdmit(py::object part) : part_(std::move(part)) {}
  std::vector<double> score(std::int64_t now, Mechanism& mechanism, std::size_t pool,
                            const std::vector<std::int64_t>& tasks) override {
    const py::object answer =
        part_.attr("score")(now, task_view(mechanism, pool, tasks), replica_view(mechanism, pool));
    const py::array_t<double, py::array::c_style | py::array::forcecast> array =
        reference("checked")(answer, py::make_tuple(tasks.size()), "admit", part_);
    std::vector<double> scores(array.data(), array.data() + array.size());
    for (std::size_t i = 0; i < scores.size(); ++i)
      if (std::isnan(scores[i]))
        throw PolicyError("admit " + name() + ": score of task " + std::to_string(tasks[i]) +
                          " is NaN at now=" + std::to_string(now));
    return scores;
  }
  std::string name() const override { return name_of(part_); }
  std::int64_t retry_after_ns() const override { return py::cast<std::int64_t>(part_.attr("retry_after_ns")); }

 private:
  py::object part_;
};

// A graph of several stages: sage_core.executor.Run.
class PythonRun : public Run {
 public:
  PythonRun(py::object run, py::object stages) : run_(std::move(run)), stages_(std::move(stages)) {}
  StageWork work(std::int64_t stage, std::int64_t cap) override {
    const auto work = py::cast<std::pair<std::int64_t, std::int64_t>>(run_.attr("work")(stages_[py::int_(stage)], cap));
    return {work.first, work.second};
  }
  std::vector<std::int64_t> finished(std::int64_t stage, std::int64_t output_tokens) override {
    std::vector<std::int64_t> ready;
    for (const py::handle& follower : run_.attr("finished")(stage, output_tokens))
      ready.push_back(py::cast<std::int64_t>(follower.attr("index")));
    return ready;
  }
  Due due(std::int64_t stage, Due request, std::int64_t cap, const std::vector<Speed>& speeds) override {
    static py::object* speed = new py::object(py::module_::import("sage_core.policy").attr("Speed"));
    py::list of;
    for (const Speed& each : speeds) of.append((*speed)(each.fixed_ns, each.input_token_ns, each.output_token_ns));
    const auto due = py::cast<std::pair<std::int64_t, std::int64_t>>(
        run_.attr("due")(stages_[py::int_(stage)], request.ttft_at, request.at, cap, of));
    return {due.first, due.second};
  }
  bool done() const override { return py::cast<bool>(run_.attr("done")); }

 private:
  py::object run_, stages_;
};

Policy policy_of(const py::object& parts) {
  Policy policy;
  policy.name = py::cast<std::string>(parts[py::int_(0)]);
  const py::object admit = parts[py::int_(1)], predict = parts[py::int_(5)];
  if (!admit.is_none())
    policy.admit =
        py::isinstance<Admit>(admit) ? py::cast<std::shared_ptr<Admit>>(admit) : std::make_shared<PythonAdmit>(admit);
  policy.order = order_of(parts[py::int_(2)]);
  policy.route = route_of(parts[py::int_(3)]);
  policy.limit = limit_of(parts[py::int_(4)]);
  policy.predict = py::isinstance<Predict>(predict) ? py::cast<std::shared_ptr<Predict>>(predict)
                                                    : std::make_shared<PythonPredict>(predict);
  return policy;
}

Pipeline pipeline_of(const std::string& name, const py::object& given) {
  Pipeline pipeline;
  pipeline.name = label(name);
  const py::object stages = given.attr("stages");
  for (const py::handle& stage : stages) pipeline.pools.push_back(py::cast<std::string>(stage.attr("op").attr("pool")));
  for (const py::handle& stage : given.attr("first"))
    pipeline.first.push_back(py::cast<std::int64_t>(stage.attr("index")));
  const py::object single = given.attr("single");
  pipeline.single = !single.is_none();
  pipeline.generates = pipeline.single && py::cast<bool>(single);
  pipeline.critical_path = py::cast<bool>(given.attr("critical_path"));
  if (!pipeline.single) {
    const py::object answering = given.attr("answering");
    for (std::size_t stage = 0; stage < pipeline.pools.size(); ++stage)
      pipeline.answering.push_back(answering.contains(stage));
  }
  const py::object make = py::module_::import("sage_core.executor").attr("Run");
  pipeline.run = [given, stages, make](std::int64_t input_tokens) -> std::unique_ptr<Run> {
    return std::make_unique<PythonRun>(make(given, input_tokens), stages);
  };
  return pipeline;
}

// Called with an exception in flight that came up while the policy was asked.
void blame(const std::string& policy) {
  try {
    throw;
  } catch (py::error_already_set& error) {
    const py::object value = error.value();
    if (error.trace()) PyException_SetTraceback(value.ptr(), error.trace().ptr());
    if (!PyErr_GivenExceptionMatches(value.ptr(), PyExc_Exception)) return;  // Ctrl-C, exit: nobody's fault
    if (py::isinstance(value, py::module_::import("sage_core.errors").attr("SageError"))) return;
    const py::object theirs = py::module_::import("sage_core.policy").attr("raised")(policy, value);
    if (theirs.is_none()) return;
    PyException_SetCause(theirs.ptr(), py::object(value).release().ptr());
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(theirs.ptr())), theirs.ptr());
    throw py::error_already_set();
  } catch (...) {  // not the author's code
  }
}

}  // namespace

void register_plane(py::module_& m) {
  py::class_<Plane>(m, "Plane", "The control plane; its meaning is sage_core.plane.ControlPlane.")
      .def(py::init([](const std::map<std::string, py::object>& pipelines, const py::object& make_policy,
                       const std::string& policy, std::int64_t attempts_max) {
             std::vector<Pipeline> all;
             for (const auto& [name, pipeline] : pipelines) all.push_back(pipeline_of(name, pipeline));
             return std::make_unique<Plane>(
                 std::move(all), [make_policy](const std::string& name) { return policy_of(make_policy(name)); },
                 policy, attempts_max, blame);
           }),
           py::arg("pipelines"), py::arg("make_policy"), py::arg("policy"), py::arg("attempts_max"))
      .def("step",
           [](Plane& plane, std::int64_t now, std::string_view events) {
             std::vector<Command> commands;
             plane.step(now, decode_events(events), commands);
             std::string out;
             encode(commands, out);
             return py::bytes(out);
           })
      .def("check", &Plane::check)
      .def_property_readonly("wakeup_at", &Plane::wakeup_at)
      .def_property_readonly("live", &Plane::live)
      .def_property_readonly("tasks_queued", &Plane::tasks_queued)
      .def("queue_depths", &Plane::queue_depths)
      .def_property_readonly("counts", [](const Plane& plane) {
        const Counts& c = plane.counts();
        return py::make_tuple(c.arrived, c.responded, c.rejected, c.cancelled, c.failed, c.retries, c.decisions);
      });

  m.def(
      "encode_again",
      [](std::string_view events) {
        std::string out;
        encode(decode_events(events), out);
        return py::bytes(out);
      },
      "Events read and written natively: for tests of the encoding.");
  m.def("blake2b_16", [](std::string_view data) {
    const Digest digest = blake2b_16(data);
    return py::bytes(digest.data(), digest.size());
  });
}

}  // namespace sage
