#include "sage/recorder.hpp"

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <map>
#include <unordered_map>

#include "sage/errors.hpp"
#include "sage/id_map.hpp"

namespace py = pybind11;

namespace sage {

namespace {

using columns::Binary;
using columns::Double;
using columns::FixedBinary;
using columns::Flags;
using columns::Int32;
using columns::Int64;
using columns::kNoWord;
using columns::Labels;
using columns::Table;
using columns::Taken;
using columns::Word;
using columns::Words;
using Instant = std::optional<std::int64_t>;

constexpr std::array<const char*, 3> kKinds{"chat", "generate", "embedding"};
constexpr std::array<const char*, 4> kTaskOutcomes{"finished", "cancelled", "failed", "lost"};
enum TaskOutcome : std::size_t { kFinished, kCancelledTask, kFailedTask, kLost };

// --- the tables of sage_bench/results/schema.py
// -----------------------------------------------------------------------

struct Requests : Table {
  using Table::Table;
  Int64 request{columns, "request"};
  Labels kind{columns, "kind", words};
  Labels tenant{columns, "tenant", words};
  Int32 priority{columns, "priority"};
  Labels pipeline{columns, "pipeline", words};
  Int64 scheduled_ns{columns, "scheduled_ns"};
  Int64 arrived_ns{columns, "arrived_ns"};
  Int64 dispatched_ns{columns, "dispatched_ns"};
  Int64 first_token_ns{columns, "first_token_ns"};
  Int64 ended_ns{columns, "ended_ns"};
  Int64 input_tokens{columns, "input_tokens"};
  Int64 output_tokens{columns, "output_tokens"};
  Int64 output_tokens_max{columns, "output_tokens_max"};
  Int64 ttft_due_ns{columns, "ttft_due_ns"};
  Int64 due_ns{columns, "due_ns"};
  Labels outcome{columns, "outcome", words};
  Labels reason{columns, "reason", words};
  Int32 tasks{columns, "tasks"};
  Int32 retries{columns, "retries"};
  Int64 replica{columns, "replica"};
  Labels node{columns, "node", words};
  Int64 queue_ns{columns, "queue_ns"};
  Int64 ttft_ns{columns, "ttft_ns"};
  Double tpot_ns{columns, "tpot_ns"};
  Int64 e2e_ns{columns, "e2e_ns"};
  Flags ttft_ok{columns, "ttft_ok"};
  Flags tpot_ok{columns, "tpot_ok"};
  Flags e2e_ok{columns, "e2e_ok"};
  Flags good{columns, "good"};
  Flags warmup{columns, "warmup"};
};

struct Tasks : Table {
  using Table::Table;
  Int64 task{columns, "task"};
  Int64 request{columns, "request"};
  Int32 stage{columns, "stage"};
  Labels op{columns, "op", words};
  Labels pool{columns, "pool", words};
  Int32 attempt{columns, "attempt"};
  Int64 replica{columns, "replica"};
  Labels node{columns, "node", words};
  Int64 device{columns, "device"};
  Int64 queued_ns{columns, "queued_ns"};
  Int64 dispatched_ns{columns, "dispatched_ns"};
  Int64 first_token_ns{columns, "first_token_ns"};
  Int64 ended_ns{columns, "ended_ns"};
  Int64 input_tokens{columns, "input_tokens"};
  Int64 output_tokens{columns, "output_tokens"};
  Int64 batch{columns, "batch"};
  Int32 batch_tasks{columns, "batch_tasks"};
  Labels outcome{columns, "outcome", words};
};

struct Reports : Table {
  using Table::Table;
  Int64 at_ns{columns, "at_ns"};
  Int64 replica{columns, "replica"};
  Labels pool{columns, "pool", words};
  Labels node{columns, "node", words};
  Int64 device{columns, "device"};
  Int64 running{columns, "running"};
  Int64 waiting{columns, "waiting"};
  Int64 kv_blocks_free{columns, "kv_blocks_free"};
  Int64 in_flight{columns, "in_flight"};
};

struct Steps : Table {
  using Table::Table;
  Int64 step{columns, "step"};
  Int64 now{columns, "now"};
  Binary events{columns, "events"};
  FixedBinary<Digest> digest{columns, "digest"};
};

// --- what is live ----------------------------------------------------------------------------------------------------

struct Stage {
  Word op, pool;
};

struct Plan {
  Word name;
  std::vector<Stage> stages;
};

struct Live {               // a request that has not ended
  std::int64_t serial = 0;  // in order of arrival
  RequestArrived event{};
  const Plan* plan = nullptr;
  std::int64_t arrived_ns = 0;
  Instant dispatched_ns = std::nullopt, first_token_ns = std::nullopt;
  std::int64_t first_token_stage = -1;  // the last generating stage so far
  std::int64_t stage_tokens = 0;        // output tokens of that stage
  std::int64_t output_tokens = 0;       // of all stages
  std::int32_t tasks = 0, retries = 0;
  std::optional<std::size_t> replica = std::nullopt;
  std::int64_t queue_ns = 0;
};

struct Flight {             // a task that is on a replica
  std::int64_t serial = 0;  // in order of dispatch
  Task task{};
  std::size_t replica = 0;
  Stage stage{};
  std::int64_t dispatched_ns = 0, batch = 0, batch_tasks = 0;
  Instant first_token_ns = std::nullopt;
  std::int64_t output_tokens = 0;
};

template <class Held>
std::vector<std::int64_t> in_order(const IdMap<Held>& held, const std::function<bool(const Held&)>& wanted = nullptr) {
  std::vector<std::pair<std::int64_t, std::int64_t>> found;
  held.each([&](std::int64_t id, const Held& each) {
    if (!wanted || wanted(each)) found.emplace_back(each.serial, id);
  });
  std::sort(found.begin(), found.end());
  std::vector<std::int64_t> ids;
  for (const auto& pair : found) ids.push_back(pair.second);
  return ids;
}

Instant unless_never(std::int64_t instant) { return instant == kNever ? std::nullopt : Instant(instant); }

template <std::size_t N>
std::array<Word, N> words_of(Words& words, const std::array<const char*, N>& texts) {
  std::array<Word, N> out;
  for (std::size_t i = 0; i < N; ++i) out[i] = words.of(texts[i]);
  return out;
}

}  // namespace

struct Recorder::State {
  explicit State(Config given) : config(std::move(given)) {
    for (const auto& [name, stages] : config.pipelines) {
      Plan& plan = plans[label(name)];
      plan.name = words.of(name);
      for (const auto& [op, pool] : stages) plan.stages.push_back({words.of(op), words.of(pool)});
    }
    tables = {{"requests", &requests}, {"replicas", &reports}};
    if (config.tasks) tables.emplace_back("tasks", &task_rows);
    if (config.steps) tables.emplace_back("steps", &steps);
  }

  // As Plane::pipeline_of: "chat@MODEL" is "chat" on the pool MODEL.
  const Plan* plan_of(Label name) {
    if (const auto found = plans.find(name); found != plans.end()) return &found->second;
    const std::size_t at = name->find('@');
    if (at == std::string::npos || at + 1 == name->size()) return nullptr;
    const auto base = plans.find(label(std::string_view(*name).substr(0, at)));
    if (base == plans.end() || base->second.stages.size() != 1) return nullptr;
    Plan served{words.of(*name), base->second.stages};
    served.stages[0].pool = words.of(name->substr(at + 1));
    return &plans.emplace(name, std::move(served)).first->second;
  }

  // --- events ---

  void on(std::int64_t now, const RequestArrived& event) {
    const Plan* plan = plan_of(event.pipeline);
    if (!plan) {
      std::string known;
      for (const auto& each : config.pipelines) known += (known.empty() ? "" : ", ") + each.first;
      throw Unrecordable("pipeline '" + *event.pipeline + "' (request " + std::to_string(event.request) +
                         "): not among the run's pipelines (" + known + "); add it to the pipeline configuration");
    }
    using Limits = std::numeric_limits<std::int32_t>;
    if (event.priority < Limits::min() || event.priority > Limits::max())
      throw Unrecordable("request " + std::to_string(event.request) + ": priority " + std::to_string(event.priority) +
                         " is out of range; expected a whole number of 32 bits");
    if (!live.emplace(event.request, {arrived, event, plan, now}).second)
      throw InvariantViolation("invariant 1: request " + std::to_string(event.request) + " arrived twice");
    ++arrived;
  }

  void on(std::int64_t, const RequestCancelled& event) { went_away.push_back(event.request); }

  void on(std::int64_t now, const TokensProduced& event) {
    Flight* flight = flights.find(event.task);
    if (!flight) return;
    flight->output_tokens += event.count;
    if (event.count && !flight->first_token_ns) first_token(now, *flight);
  }

  void on(std::int64_t now, const TaskFinished& event) {
    Flight* flight = flights.find(event.task);
    if (!flight) return;
    flight->output_tokens = event.output_tokens;
    // What does not generate has a result of a size too: passages, or an outcome.
    if (event.output_tokens != 0 && flight->task.output_tokens_max != 0) {
      if (!flight->first_token_ns) first_token(now, *flight);  // not streamed: it came with the last
      if (Live* request = live.find(request_of(event.task))) {
        request->output_tokens += event.output_tokens;
        if (flight->task.stage == request->first_token_stage) request->stage_tokens = event.output_tokens;
      }
    }
    task_ended(now, event.task, kFinished);
  }

  void on(std::int64_t now, const TaskFailed& event) { task_ended(now, event.task, kFailedTask); }

  void on(std::int64_t now, const ReplicaReported& event) {
    const auto found = replica_of.find(event.replica);
    if (found == replica_of.end()) return;  // it left while its report was on the way
    const Replica& replica = replicas[found->second];
    reports.at_ns.push(now);
    reports.replica.push(event.replica);
    reports.pool.push(replica.pool);
    reports.node.push(replica.node);
    reports.device.push(replica.joined->device);
    reports.running.push(event.running);
    reports.waiting.push(event.waiting);
    reports.kv_blocks_free.push(event.kv_blocks_free);
    reports.in_flight.push(replica.in_flight);
  }

  void on(std::int64_t now, const JoinedEvent& event) {
    replica_of[event->replica] = replicas.size();
    replicas.push_back({event, now, words.of(event->pool), words.of(event->node)});
  }

  void on(std::int64_t now, const ReplicaLeft& event) {
    const auto found = replica_of.find(event.replica);
    if (found == replica_of.end()) return;
    const std::size_t replica = found->second;
    replicas[replica].left_ns = now;
    for (const std::int64_t task :
         in_order<Flight>(flights, [replica](const Flight& flight) { return flight.replica == replica; }))
      task_ended(now, task, kLost);
  }

  void on(std::int64_t, const ReplicaDraining&) {}
  void on(std::int64_t, const PolicyChanged&) {}
  void on(std::int64_t, const RunEnded&) {}

  // --- commands ---

  void on(std::int64_t now, const Dispatch& command) {
    const auto found = replica_of.find(command.replica);
    if (found == replica_of.end())
      throw InvariantViolation("invariant 4: dispatch to replica " + std::to_string(command.replica) +
                               ", which never joined");
    const std::int64_t batch = batches++;
    const auto batch_tasks = static_cast<std::int64_t>(command.tasks.size());
    for (const Task& task : command.tasks) {
      const auto refuse = [&task](const std::string& why) {
        throw InvariantViolation("task " + std::to_string(task.task) + " dispatched, but " + why);
      };
      Live* owner = live.find(request_of(task.task));
      if (!owner) refuse("its request is not live");
      Live& request = *owner;
      const std::vector<Stage>& stages = request.plan->stages;
      if (task.stage < 0 || task.stage >= static_cast<std::int64_t>(stages.size()))
        refuse("its pipeline has no stage " + std::to_string(task.stage));
      const Stage stage = stages[static_cast<std::size_t>(task.stage)];
      if (!flights.emplace(task.task, {dispatched, task, found->second, stage, now, batch, batch_tasks}).second)
        refuse("it is already in flight (invariant 3)");
      ++replicas[found->second].in_flight;
      if (!request.dispatched_ns) request.dispatched_ns = now;
      request.replica = found->second;
      ++request.tasks;
      request.queue_ns += now - task.queued_at;
      if (task.attempt != 0) ++request.retries;
      ++dispatched;
    }
  }

  void on(std::int64_t now, const Cancel& command) { task_ended(now, command.task, kCancelledTask); }
  void on(std::int64_t now, const Respond& command) { end(now, command.request, kResponded, kNoWord); }
  void on(std::int64_t now, const Reject& command) { end(now, command.request, kRejected, words.of(command.reason)); }
  void on(std::int64_t now, const Fail& command) { end(now, command.request, kFailed, words.of(command.reason)); }

  // --- rows ---

  void first_token(std::int64_t now, Flight& flight) {
    flight.first_token_ns = now;
    Live* request = live.find(request_of(flight.task.task));
    if (!request || flight.task.stage < request->first_token_stage) return;
    request->first_token_stage = flight.task.stage;
    request->first_token_ns = now;
    request->stage_tokens = 0;
  }

  void task_ended(std::int64_t now, std::int64_t task, TaskOutcome outcome) {
    const Flight* flight = flights.find(task);
    if (!flight) return;
    --replicas[flight->replica].in_flight;
    write_task(*flight, now, task_outcome_words[outcome]);
    flights.erase(task);
  }

  void write_task(const Flight& flight, Instant ended_ns, Word outcome) {
    if (!config.tasks) return;
    const Task& task = flight.task;
    const Replica& replica = replicas[flight.replica];
    task_rows.task.push(task.task);
    task_rows.request.push(request_of(task.task));
    task_rows.stage.push(static_cast<std::int32_t>(task.stage));
    task_rows.op.push(flight.stage.op);
    task_rows.pool.push(flight.stage.pool);
    task_rows.attempt.push(static_cast<std::int32_t>(task.attempt));
    task_rows.replica.push(replica.joined->replica);
    task_rows.node.push(replica.node);
    task_rows.device.push(replica.joined->device);
    task_rows.queued_ns.push(task.queued_at);
    task_rows.dispatched_ns.push(flight.dispatched_ns);
    task_rows.first_token_ns.push(flight.first_token_ns);
    task_rows.ended_ns.push(ended_ns);
    task_rows.input_tokens.push(task.input_tokens);
    task_rows.output_tokens.push(flight.output_tokens);
    task_rows.batch.push(flight.batch);
    task_rows.batch_tasks.push(static_cast<std::int32_t>(flight.batch_tasks));
    task_rows.outcome.push(outcome);
  }

  // now: none if the run was cut short.
  void end(Instant now, std::int64_t number, Outcome outcome, Word why) {
    const Live* found = live.find(number);
    if (!found)
      throw InvariantViolation("invariant 1: request " + std::to_string(number) + " " + kOutcomes[outcome] +
                               ", but it already ended or never arrived");
    const Live& request = *found;
    const RequestArrived& event = request.event;
    const std::optional<double> tpot_max = tpot_max_of(event.kind, event.priority);
    const Word kind = kind_words.at(static_cast<std::size_t>(event.kind));
    Instant ttft_ns, e2e_ns;
    std::optional<double> tpot_ns;
    if (request.first_token_ns) ttft_ns = *request.first_token_ns - event.scheduled_at;
    const bool has_ttft = event.ttft_due_at != kNever, has_e2e = event.due_at != kNever;
    std::optional<bool> ttft_ok, tpot_ok, e2e_ok;
    bool good = false;
    if (outcome == kResponded) {
      e2e_ns = *now - event.scheduled_at;
      if (ttft_ns && request.stage_tokens > 1 && *e2e_ns > *ttft_ns)
        tpot_ns = static_cast<double>(*e2e_ns - *ttft_ns) / static_cast<double>(request.stage_tokens - 1);
      // Where nothing is generated the response itself is the first output.
      if (has_ttft) ttft_ok = request.first_token_ns.value_or(*now) <= event.ttft_due_at;
      if (tpot_max && tpot_ns) tpot_ok = *tpot_ns <= *tpot_max;
      if (has_e2e) e2e_ok = *now <= event.due_at;
      good = ttft_ok.value_or(true) && tpot_ok.value_or(true) && e2e_ok.value_or(true);
    } else {
      if (has_ttft) ttft_ok = false;
      if (tpot_max) tpot_ok = false;
      if (has_e2e) e2e_ok = false;
    }
    requests.request.push(number);
    requests.kind.push(kind);
    requests.tenant.push(words.of(event.tenant));
    requests.priority.push(static_cast<std::int32_t>(event.priority));
    requests.pipeline.push(request.plan->name);
    requests.scheduled_ns.push(event.scheduled_at);
    requests.arrived_ns.push(request.arrived_ns);
    requests.dispatched_ns.push(request.dispatched_ns);
    requests.first_token_ns.push(request.first_token_ns);
    requests.ended_ns.push(now);
    requests.input_tokens.push(event.input_tokens);
    requests.output_tokens.push(request.output_tokens);
    requests.output_tokens_max.push(event.output_tokens_max);
    requests.ttft_due_ns.push(unless_never(event.ttft_due_at));
    requests.due_ns.push(unless_never(event.due_at));
    requests.outcome.push(outcome_words[outcome]);
    requests.reason.push(why);
    requests.tasks.push(request.tasks);
    requests.retries.push(request.retries);
    requests.replica.push(request.replica ? Instant(replicas[*request.replica].joined->replica) : std::nullopt);
    requests.node.push(request.replica ? replicas[*request.replica].node : kNoWord);
    requests.queue_ns.push(request.queue_ns);
    requests.ttft_ns.push(ttft_ns);
    requests.tpot_ns.push(tpot_ns);
    requests.e2e_ns.push(e2e_ns);
    requests.ttft_ok.push(ttft_ok);
    requests.tpot_ok.push(tpot_ok);
    requests.e2e_ok.push(e2e_ok);
    requests.good.push(good);
    requests.warmup.push(!(config.warmup_ns <= event.scheduled_at && event.scheduled_at < config.cooldown_at));
    ++outcomes[outcome];
    live.erase(number);
  }

  bool full(const Table& table) const {
    return table.rows() >= config.buffer_rows ||
           (&table == &steps && static_cast<std::int64_t>(steps.events.bytes()) >= config.buffer_bytes);
  }

  std::optional<double> tpot_max_of(std::int64_t kind, std::int64_t priority) {
    const auto [found, added] = tpot_known.try_emplace({kind, priority});
    if (added) found->second = config.tpot_max_ns(kind, priority);
    return found->second;
  }

  Config config;
  Words words;
  std::array<Word, kKinds.size()> kind_words = words_of(words, kKinds);
  std::array<Word, kOutcomes.size()> outcome_words = words_of(words, kOutcomes);
  std::array<Word, kTaskOutcomes.size()> task_outcome_words = words_of(words, kTaskOutcomes);
  Word went_away_word = words.of("the client went away");
  std::unordered_map<Label, Plan> plans;
  std::map<std::pair<std::int64_t, std::int64_t>, std::optional<double>> tpot_known;

  Requests requests{words};
  Tasks task_rows{words};
  Reports reports{words};
  Steps steps{words};
  std::vector<std::pair<std::string, Table*>> tables;

  IdMap<Live> live;
  IdMap<Flight> flights;
  std::vector<Replica> replicas;
  std::unordered_map<std::int64_t, std::size_t> replica_of;  // by id; the last to join under it
  std::vector<std::int64_t> went_away;
  std::int64_t arrived = 0, dispatched = 0, batches = 0, steps_taken = 0;
  std::array<std::int64_t, kOutcomes.size()> outcomes{};
};

Recorder::Recorder(Config config) : state_(std::make_unique<State>(std::move(config))) {}
Recorder::~Recorder() = default;

void Recorder::step(std::int64_t now, const std::vector<Event>& events, const std::vector<Command>& commands,
                    std::string_view encoded, const Digest& digest) {
  State& s = *state_;
  for (const Event& event : events) std::visit([&](const auto& each) { s.on(now, each); }, event);
  for (const Command& command : commands) std::visit([&](const auto& each) { s.on(now, each); }, command);
  for (const std::int64_t request : s.went_away)
    if (s.live.count(request)) s.end(now, request, kCancelled, s.went_away_word);
  s.went_away.clear();
  if (s.config.steps) {
    s.steps.step.push(s.steps_taken++);
    s.steps.now.push(now);
    s.steps.events.push(encoded);
    s.steps.digest.push(digest);
  }
}

bool Recorder::full() const {
  const auto& tables = state_->tables;
  return std::any_of(tables.begin(), tables.end(), [this](const auto& each) { return state_->full(*each.second); });
}

std::vector<std::string> Recorder::full_tables() const {
  std::vector<std::string> names;
  for (const auto& [name, table] : state_->tables)
    if (state_->full(*table)) names.push_back(name);
  return names;
}

void Recorder::abort(const std::string& reason) {
  for (const std::int64_t request : live()) state_->end(std::nullopt, request, kFailed, state_->words.of(reason));
  for (const std::int64_t task : in_order<Flight>(state_->flights))
    state_->write_task(state_->flights.at(task), std::nullopt, kNoWord);
  state_->flights.clear();
}

std::vector<std::string> Recorder::tables() const {
  std::vector<std::string> names;
  for (const auto& each : state_->tables) names.push_back(each.first);
  return names;
}

columns::Table& Recorder::table(const std::string& name) {
  for (const auto& each : state_->tables)
    if (each.first == name) return *each.second;
  throw std::out_of_range("no table " + name + " is kept");
}

std::vector<std::int64_t> Recorder::live() const { return in_order<Live>(state_->live); }
std::int64_t Recorder::arrived() const { return state_->arrived; }
std::int64_t Recorder::tasks() const { return state_->dispatched; }
const std::array<std::int64_t, 4>& Recorder::outcomes() const { return state_->outcomes; }
const std::vector<Recorder::Replica>& Recorder::replicas() const { return state_->replicas; }

// --- Python ----------------------------------------------------------------------------------------------------------

namespace {

Recorder::Config config_of(const py::dict& pipelines, py::function tpot_max_ns, std::int64_t warmup_ns,
                           std::int64_t cooldown_at, bool tasks, bool steps, std::int64_t buffer_rows,
                           std::int64_t buffer_bytes) {
  Recorder::Config config{{},          py::cast<decltype(Recorder::Config::tpot_max_ns)>(tpot_max_ns),
                          warmup_ns,   cooldown_at,
                          tasks,       steps,
                          buffer_rows, buffer_bytes};
  for (const auto& [name, stages] : pipelines)
    config.pipelines.emplace_back(py::cast<std::string>(name), py::cast<Recorder::Config::Stages>(stages));
  return config;
}

Task task_of(py::handle task) {
  const auto field = [task](const char* name) { return py::cast<std::int64_t>(task.attr(name)); };
  return {field("task"),      field("stage"),        field("attempt"),           field("priority"),
          field("queued_at"), field("input_tokens"), field("output_tokens_max"), field("prefix")};
}

Command command_of(py::handle command) {
  const auto name = py::cast<std::string>(py::type::handle_of(command).attr("__name__"));
  const auto field = [command](const char* of) { return py::cast<std::int64_t>(command.attr(of)); };
  const auto text = [command](const char* of) { return py::cast<std::string>(command.attr(of)); };
  if (name == "Dispatch") {
    Dispatch dispatch{field("replica"), {}};
    for (py::handle task : command.attr("tasks")) dispatch.tasks.push_back(task_of(task));
    return dispatch;
  }
  if (name == "Cancel") return Cancel{field("replica"), field("task")};
  if (name == "Respond") return Respond{field("request")};
  if (name == "Reject") return Reject{field("request"), text("reason"), field("retry_after_ns")};
  if (name == "Fail") return Fail{field("request"), text("reason")};
  throw py::type_error("not a command: " + name);
}

py::list taken_of(Recorder& recorder, const std::string& table) {
  py::list out;
  for (columns::Column* column : recorder.table(table).columns) {
    const Taken taken = column->take();
    py::list buffers;
    for (const columns::Buffer& buffer : taken.buffers)
      buffers.append(buffer.owner ? py::cast(buffer) : py::object(py::none()));
    out.append(py::make_tuple(taken.nulls, buffers, taken.labels));
  }
  return out;
}

}  // namespace

void register_recorder(py::module_& m) {
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Unrecordable& error) {
      py::set_error(py::module_::import("sage_core.errors").attr("ConfigError"), error.what());
    }
  });

  using columns::Buffer;
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol(), "Memory of a column; read it through the buffer protocol.")
      .def_buffer([](Buffer& self) {
        return py::buffer_info(const_cast<void*>(self.data), 1, py::format_descriptor<std::uint8_t>::format(), 1,
                               {static_cast<py::ssize_t>(self.bytes)}, {1}, true);
      });

  py::class_<Recorder>(m, "Recorder", "Folds a run's steps into columns; sage_bench.results.recorder says how.")
      .def(py::init([](const py::dict& pipelines, py::function tpot_max_ns, std::int64_t warmup_ns,
                       std::int64_t cooldown_at, bool tasks, bool steps, std::int64_t buffer_rows,
                       std::int64_t buffer_bytes) {
             return std::make_unique<Recorder>(config_of(pipelines, std::move(tpot_max_ns), warmup_ns, cooldown_at,
                                                         tasks, steps, buffer_rows, buffer_bytes));
           }),
           py::arg("pipelines"), py::arg("tpot_max_ns"), py::kw_only(), py::arg("warmup_ns"), py::arg("cooldown_at"),
           py::arg("tasks"), py::arg("steps"), py::arg("buffer_rows"), py::arg("buffer_bytes"))
      .def(
          "step",
          [](Recorder& self, std::int64_t now, std::string_view events, const py::iterable& commands,
             std::string_view digest) {
            std::vector<Command> decided;
            for (py::handle command : commands) decided.push_back(command_of(command));
            Digest bytes;
            if (digest.size() != bytes.size()) throw py::value_error("digest: expected 16 bytes");
            std::copy(digest.begin(), digest.end(), bytes.begin());
            self.step(now, decode_events(events), decided, events, bytes);
          },
          py::arg("now"), py::arg("events"), py::arg("commands"), py::arg("digest"))
      .def("abort", &Recorder::abort, py::arg("reason"))
      .def("tables", &Recorder::tables)
      .def("full_tables", &Recorder::full_tables)
      .def(
          "columns",
          [](Recorder& self, const std::string& table) {
            py::list out;
            for (const columns::Column* column : self.table(table).columns)
              out.append(py::make_tuple(column->name, column->type));
            return out;
          },
          py::arg("table"))
      .def(
          "rows", [](Recorder& self, const std::string& table) { return self.table(table).rows(); }, py::arg("table"))
      .def("take", &taken_of, py::arg("table"))
      .def("live", &Recorder::live)
      .def_property_readonly("arrived", &Recorder::arrived)
      .def_property_readonly("tasks", &Recorder::tasks)
      .def_property_readonly("outcomes",
                             [](const Recorder& self) {
                               py::dict out;
                               for (std::size_t i = 0; i < Recorder::kOutcomes.size(); ++i)
                                 out[Recorder::kOutcomes[i]] = self.outcomes()[i];
                               return out;
                             })
      .def("replicas", [](const Recorder& self) {
        py::list out;
        for (const Recorder::Replica& each : self.replicas())
          out.append(py::dict(py::arg("replica") = each.joined->replica, py::arg("pool") = each.joined->pool,
                              py::arg("pool_kind") = each.joined->pool_kind, py::arg("node") = each.joined->node,
                              py::arg("device") = each.joined->device, py::arg("joined_ns") = each.joined_ns,
                              py::arg("left_ns") = each.left_ns));
        return out;
      });
}

}  // namespace sage
