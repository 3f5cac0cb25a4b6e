// Python's view of the event loop, and the devices it steps: native engines, or objects written in Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <unordered_map>

#include "sage/engine.hpp"
#include "sage/errors.hpp"
#include "sage/loop.hpp"
#include "sage/recorder.hpp"

namespace py = pybind11;

namespace sage {
namespace {

using Column = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

// The native half of sage_sim.engine.SimulatedDevice.
class EngineDevice : public LoopDevice {
 public:
  // device: the SimulatedDevice; it owns the engine and says why a task failed. A replica of -1 is absent.
  // block_size: of the LLM engine's prefix cache, 0 without one.
  EngineDevice(py::object device, Engine& engine, std::int64_t llm, std::int64_t embed, std::int64_t block_size)
      : device_(std::move(device)), engine_(engine), llm_(llm), embed_(embed), block_size_(block_size) {}

  void step(std::int64_t now, const Command* command, const Truth& truth, std::vector<Event>& told) override {
    try {
      tell(engine_.advance(now), told);
      if (command == nullptr) return;
      if (const auto* dispatch = std::get_if<Dispatch>(command)) {
        for (const Task& task : dispatch->tasks) submit(now, dispatch->replica, task, truth);
      } else {
        engine_.cancel(now, std::get<Cancel>(*command).task);
      }
      tell(engine_.advance(now), told);
    } catch (const std::overflow_error& error) {
      device_.attr("too_long")(error.what());
    }
  }
  std::int64_t wakeup_at() override {
    try {
      return engine_.wakeup_at();
    } catch (const std::overflow_error& error) {
      device_.attr("too_long")(error.what());
      return kNever;
    }
  }
  void report(std::int64_t now, std::vector<Event>& reports) override {
    engine_.run(now);
    if (llm_ >= 0)
      reports.push_back(ReplicaReported{llm_, engine_.running(), engine_.waiting(), engine_.kv_blocks_free()});
    if (embed_ >= 0) reports.push_back(ReplicaReported{embed_, engine_.embed_running(), engine_.embed_waiting(), 0});
  }

 private:
  void submit(std::int64_t now, std::int64_t replica, const Task& task, const Truth& truth) {
    if (replica == embed_) return engine_.submit_embed(now, task.task, task.input_tokens);
    const TruthOf& known = truth.at(request_of(task.task));
    const std::int64_t output_tokens = std::min(known.result(task.stage), task.output_tokens_max);
    if (output_tokens < 1 || task.input_tokens < 1)
      device_.attr("no_tokens")(request_of(task.task), task.input_tokens, output_tokens);
    engine_.submit_llm(now, task.task, task.input_tokens, output_tokens, task.priority, split(known));
  }
  // The engine's blocks in those of the load: parts of equal blocks are equal.
  std::vector<std::int64_t> split(const TruthOf& known) {
    std::vector<std::int64_t> blocks;
    if (block_size_ == 0 || !known.contents) return blocks;
    const std::int64_t parts = known.contents->block_tokens / block_size_;
    if (parts * block_size_ != known.contents->block_tokens || parts == 0)
      device_.attr("uneven_blocks")(known.contents->block_tokens);
    blocks.reserve(known.contents->blocks.size() * static_cast<std::size_t>(parts));
    for (const std::int64_t block : known.contents->blocks)
      for (std::int64_t part = 0; part < parts; ++part) blocks.push_back(block * parts + part);
    return blocks;
  }
  void tell(const std::vector<Told>& from, std::vector<Event>& told) {
    for (const Told& t : from) {
      if (t.code == Code::kFinished)
        told.push_back(TaskFinished{t.task, t.value});
      else if (t.code == Code::kFirstToken)
        told.push_back(TokensProduced{t.task, t.value});
      else
        told.push_back(TaskFailed{t.task, py::cast<std::string>(device_.attr("why_failed")(t.value)), false});
    }
  }

  py::object device_;
  Engine& engine_;
  std::int64_t llm_, embed_, block_size_;
};

// Any other device, behind sage_sim.loop._Outside: bytes in, bytes out.
class PythonDevice : public LoopDevice {
 public:
  explicit PythonDevice(py::object device) : device_(std::move(device)) {}
  void step(std::int64_t now, const Command* command, const Truth&, std::vector<Event>& told) override {
    std::string encoded;
    if (command) encode(*command, encoded);
    append(device_.attr("step")(now, py::bytes(encoded)), told);
  }
  std::int64_t wakeup_at() override { return py::cast<std::int64_t>(device_.attr("wakeup_at")); }
  void report(std::int64_t now, std::vector<Event>& reports) override { append(device_.attr("report")(now), reports); }

 private:
  static void append(const py::object& encoded, std::vector<Event>& to) {
    for (Event& event : decode_events(py::cast<std::string_view>(encoded))) to.push_back(std::move(event));
  }
  py::object device_;
};

// A callable that is told of every step: (now, encoded events, encoded commands, digest).
class PythonSink : public StepSink {
 public:
  explicit PythonSink(py::object call) : call_(std::move(call)) {}
  void step(std::int64_t now, const std::vector<Event>&, const std::vector<Command>& commands, std::string_view encoded,
            const Digest& digest) override {
    std::string decided;
    encode(commands, decided);
    call_(now, py::bytes(encoded.data(), encoded.size()), py::bytes(decided), py::bytes(digest.data(), digest.size()));
  }

 private:
  py::object call_;
};

struct PythonLoop {
  py::object plane;  // kept alive
  std::unique_ptr<StepSink> own;
  py::object sink;
  std::unique_ptr<Loop> loop;
};

std::vector<JoinedEvent> joined_of(std::string_view encoded) {
  std::vector<JoinedEvent> joined;
  for (const Event& event : decode_events(encoded)) joined.push_back(std::get<JoinedEvent>(event));
  return joined;
}

Way way_of(std::int64_t delay, const py::object& draw) {
  if (draw.is_none()) return Way(delay, nullptr);
  return Way(delay, [draw] { return py::cast<std::vector<std::int64_t>>(draw()); });
}

std::shared_ptr<const Contents> contents_of(const py::handle& contents) {
  if (contents.is_none()) return nullptr;
  return std::make_shared<const Contents>(Contents{py::cast<std::int64_t>(contents.attr("block_tokens")),
                                                   py::cast<std::vector<std::int64_t>>(contents.attr("blocks"))});
}

Arrival arrival_of(std::int64_t at, std::string_view encoded, std::int64_t output_tokens, const py::object& contents,
                   const std::vector<std::int64_t>& results) {
  return {at,
          std::get<RequestArrived>(decode_events(encoded).at(0)),
          {output_tokens, contents_of(contents),
           results.empty() ? nullptr : std::make_shared<const std::vector<std::int64_t>>(results)}};
}

const TruthOf& known_of(const PythonLoop& self, std::int64_t request) {
  const TruthOf* found = self.loop->truth().find(request);
  if (!found) throw py::key_error(std::to_string(request));
  return *found;
}

}  // namespace

void register_loop(py::module_& m) {
  py::class_<PythonLoop>(m, "Loop", "The event loop of a simulated run; its meaning is sage_sim.loop_reference.Loop.")
      .def(py::init([](const py::object& plane, const py::object& record) {
             auto self = std::make_unique<PythonLoop>();
             self->plane = plane, self->sink = record;
             StepSink* sink = nullptr;
             if (py::isinstance<Recorder>(record)) {
               sink = &py::cast<Recorder&>(record);
             } else if (!record.is_none()) {
               self->own = std::make_unique<PythonSink>(record);
               sink = self->own.get();
             }
             self->loop = std::make_unique<Loop>(py::cast<Plane&>(plane), sink);
             return self;
           }),
           py::arg("plane"), py::arg("record"))
      .def("add_slot",
           [](PythonLoop& self, std::int64_t delay, const py::object& draw_to_device, const py::object& draw_to_plane) {
             return self.loop->add_slot(way_of(delay, draw_to_device), way_of(delay, draw_to_plane));
           })
      .def("join_engine",
           [](PythonLoop& self, std::int64_t now, std::size_t slot, const py::object& device, Engine& engine,
              std::int64_t llm, std::int64_t embed, std::int64_t block_size, std::string_view joined) {
             self.loop->join(now, slot, std::make_unique<EngineDevice>(device, engine, llm, embed, block_size),
                             joined_of(joined));
           })
      .def("join_python",
           [](PythonLoop& self, std::int64_t now, std::size_t slot, const py::object& device, std::string_view joined) {
             self.loop->join(now, slot, std::make_unique<PythonDevice>(device), joined_of(joined));
           })
      .def("drain", [](PythonLoop& self, std::int64_t now, std::size_t slot) { self.loop->drain(now, slot); })
      .def("leave", [](PythonLoop& self, std::int64_t now, std::size_t slot) { self.loop->leave(now, slot); })
      .def("present", [](const PythonLoop& self, std::size_t slot) { return self.loop->present(slot); })
      .def("feed",
           [](PythonLoop& self, const std::vector<std::string>& pipelines, const std::vector<std::string>& tenants,
              std::int64_t first, const Column& at, const Column& pipeline, const Column& kind, const Column& tenant,
              const Column& priority, const Column& input_tokens, const Column& output_tokens_max,
              const Column& ttft_due_at, const Column& due_at, const Column& prefix, const Column& output_tokens,
              const py::object& contents) {
             std::vector<Label> pipeline_labels, tenant_labels;
             std::unordered_map<PyObject*, std::shared_ptr<const Contents>> known;  // one object, one copy
             const auto shared_of = [&known](const py::object& each) {
               auto& shared = known[each.ptr()];
               if (!shared) shared = contents_of(each);
               return shared;
             };
             for (const std::string& name : pipelines) pipeline_labels.push_back(label(name));
             for (const std::string& name : tenants) tenant_labels.push_back(label(name));
             for (py::ssize_t i = 0; i < at.size(); ++i)
               self.loop->feed(
                   {at.at(i),
                    {first + i, pipeline_labels.at(static_cast<std::size_t>(pipeline.at(i))), kind.at(i),
                     tenant_labels.at(static_cast<std::size_t>(tenant.at(i))), priority.at(i), input_tokens.at(i),
                     output_tokens_max.at(i), at.at(i), ttft_due_at.at(i), due_at.at(i), prefix.at(i)},
                    {output_tokens.at(i), contents.is_none() ? nullptr : shared_of(contents[py::int_(i)]), nullptr}});
           })
      .def("feed_one",
           [](PythonLoop& self, std::int64_t at, std::string_view request, std::int64_t output_tokens,
              const py::object& contents, const std::vector<std::int64_t>& results) {
             self.loop->feed(arrival_of(at, request, output_tokens, contents, results));
           })
      .def("begin_arrivals", [](PythonLoop& self) { self.loop->begin_arrivals(); })
      .def("end_arrivals", [](PythonLoop& self) { self.loop->end_arrivals(); })
      .def("arrive",
           [](PythonLoop& self, std::int64_t now, std::string_view request, std::int64_t output_tokens,
              const py::object& contents, const std::vector<std::int64_t>& results) {
             self.loop->arrive(now, arrival_of(now, request, output_tokens, contents, results));
           })
      .def("expect", [](PythonLoop& self, std::int64_t more) { self.loop->expect(more); })
      .def("on_ended",
           [](PythonLoop& self, py::object call) {
             self.loop->on_ended(
                 [call = std::move(call)](std::int64_t now, std::int64_t request) { call(now, request); });
           })
      .def("scrape", [](PythonLoop& self, std::int64_t now) { self.loop->scrape(now); })
      .def("run", [](PythonLoop& self, std::int64_t until,
                     std::int64_t budget) { return static_cast<std::int64_t>(self.loop->run(until, budget)); })
      .def("stop_at", [](PythonLoop& self, std::int64_t instant) { self.loop->stop_at(instant); })
      .def("step", [](PythonLoop& self, std::int64_t now,
                      std::string_view events) { self.loop->step(now, decode_events(events)); })
      .def("output_tokens", [](const PythonLoop& self, std::int64_t request,
                               std::int64_t stage) { return known_of(self, request).result(stage); })
      .def("contents",
           [](const PythonLoop& self, std::int64_t request) {
             const auto& contents = known_of(self, request).contents;
             return contents ? std::make_pair(contents->block_tokens, contents->blocks)
                             : std::make_pair(std::int64_t{0}, std::vector<std::int64_t>());
           })
      .def_property_readonly("now", [](const PythonLoop& self) { return self.loop->now(); })
      .def_property_readonly("next_at", [](const PythonLoop& self) { return self.loop->next_at(); })
      .def_property_readonly("steps", [](const PythonLoop& self) { return self.loop->steps(); })
      .def_property_readonly("control_ns", [](const PythonLoop& self) { return self.loop->control_ns(); })
      .def_property_readonly("deciding", [](const PythonLoop& self) { return self.loop->deciding(); })
      .def_property_readonly("idle", [](const PythonLoop& self) { return self.loop->idle(); })
      .def_property_readonly("only_reports", [](const PythonLoop& self) { return self.loop->only_reports(); })
      .def_property_readonly("digest", [](const PythonLoop& self) {
        return py::bytes(self.loop->digest().data(), self.loop->digest().size());
      });
}

}  // namespace sage
