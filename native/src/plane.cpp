#include "sage/plane.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "sage/errors.hpp"

namespace sage {
namespace {

constexpr std::int64_t kTokensMaxOfRequest = std::int64_t{1} << 40;
constexpr std::int64_t kKinds = 3;
constexpr std::int64_t kIdGapMax = 1 << 20;

std::string text(std::int64_t number) { return std::to_string(number); }

const char* pool_kind_name(std::int64_t kind) {
  constexpr const char* names[] = {"LLM", "EMBEDDING", "OPERATOR"};
  return kind >= 0 && kind < 3 ? names[kind] : "unknown";
}

}  // namespace

Plane::Plane(std::vector<Pipeline> pipelines, std::function<Policy(const std::string&)> make_policy,
             const std::string& policy, std::int64_t attempts_max, std::function<void(const std::string&)> blame)
    : make_policy_(std::move(make_policy)), blame_(std::move(blame)), attempts_max_(attempts_max) {
  for (Pipeline& pipeline : pipelines) {
    const Label name = pipeline.name;
    pipelines_.emplace(name, std::move(pipeline));
  }
  bind(policy);
}

// --- a step ----------------------------------------------------------------------------------------------------------

struct Plane::On {
  Plane& plane;
  std::vector<Command>& commands;
  void operator()(const RequestArrived& e) const { plane.arrived(e, commands); }
  void operator()(const RequestCancelled& e) const { plane.cancelled(e, commands); }
  void operator()(const TokensProduced& e) const { plane.tokens(e); }
  void operator()(const TaskFinished& e) const { plane.finished(e, commands); }
  void operator()(const TaskFailed& e) const { plane.failed(e, commands); }
  void operator()(const ReplicaReported& e) const { plane.reported(e); }
  void operator()(const JoinedEvent& e) const { plane.joined(*e); }
  void operator()(const ReplicaDraining& e) const { plane.draining(e); }
  void operator()(const ReplicaLeft& e) const { plane.left(e, commands); }
  void operator()(const PolicyChanged& e) const { plane.bind(e.policy); }
  void operator()(const RunEnded& e) const { plane.ended(e, commands); }
};

void Plane::step(std::int64_t now, const std::vector<Event>& events, std::vector<Command>& commands) {
  if (now < now_) throw IllegalEvent("invariant 5: time went back from " + text(now_) + " to " + text(now));
  now_ = now;
  for (const Event& event : events) std::visit(On{*this, commands}, event);
  std::vector<Decision> decisions;
  try {
    if (!arrivals_.empty()) {
      if (policy_.admit) admit(commands);
      arrivals_.clear();
    }
    decisions = mechanism_.decide(now);
  } catch (...) {
    blame_(policy_.name);
    throw;
  }
  if (!decisions.empty()) dispatch(decisions, commands);
}

void Plane::check() const {
  const std::int64_t ended = counts_.responded + counts_.rejected + counts_.cancelled + counts_.failed;
  const auto live = static_cast<std::int64_t>(requests_.size());
  if (counts_.arrived != ended + live)
    throw InvariantViolation("invariant 1: " + text(counts_.arrived) + " requests arrived, " + text(ended) +
                             " ended, with " + text(live) + " live");
  if (tasks_.size() != mechanism_.queued() + mechanism_.in_flight())
    throw InvariantViolation("invariant 3: " + std::to_string(tasks_.size()) + " live tasks, " +
                             std::to_string(mechanism_.queued()) + " queued and " +
                             std::to_string(mechanism_.in_flight()) + " in flight");
  mechanism_.check();
}

// --- requests --------------------------------------------------------------------------------------------------------

void Plane::arrived(const RequestArrived& event, std::vector<Command>& commands) {
  const std::string subject = "request " + text(event.request);
  if (has_arrived(event.request)) throw IllegalEvent(subject + " arrived twice");
  if (event.scheduled_at > now_)
    throw IllegalEvent("invariant 4: " + subject + " is scheduled at " + text(event.scheduled_at) + ", after " +
                       text(now_));
  const auto countable = [](std::int64_t tokens) { return tokens >= 0 && tokens <= kTokensMaxOfRequest; };
  if (!countable(event.input_tokens) || !countable(event.output_tokens_max))
    throw IllegalEvent(subject + ": token counts must be from 0 to " + text(kTokensMaxOfRequest) + ", got " +
                       text(event.input_tokens) + " and " + text(event.output_tokens_max));
  if (event.kind < 0 || event.kind >= kKinds)
    throw IllegalEvent(subject + ": kind " + text(event.kind) + " is not a RequestKind");
  if (event.request > request_last_) {
    if (event.request - request_last_ > kIdGapMax)
      throw IllegalEvent(subject + ": ids must be dense, the last was " + text(request_last_));
    for (std::int64_t id = request_last_ + 1; id < event.request; ++id) requests_awaited_.insert(id);
    request_last_ = event.request;
  } else {
    requests_awaited_.erase(event.request);
  }
  ++counts_.arrived;
  const Pipeline* found = pipeline_of(event.pipeline);
  if (!found) {
    ++counts_.rejected;
    commands.push_back(Reject{event.request, "unknown pipeline " + *event.pipeline, 0});
    return;
  }
  const Pipeline& pipeline = *found;
  const std::int64_t tenant = tenants_.emplace(event.tenant, static_cast<std::int64_t>(tenants_.size())).first->second;
  Request& request = *requests_.emplace(event.request, {}).first;
  request.arrived = event, request.tenant = tenant, request.pipeline = &pipeline;
  if (!pipeline.single) request.run = pipeline.run(event.input_tokens);
  for (const std::int64_t stage : pipeline.first) arrivals_.push_back(queue(request, stage, 0));
}

const Pipeline* Plane::pipeline_of(Label name) {
  if (const auto found = pipelines_.find(name); found != pipelines_.end()) return &found->second;
  const std::size_t at = name->find('@');
  if (at == std::string::npos || at + 1 == name->size()) return nullptr;
  const auto base = pipelines_.find(label(std::string_view(*name).substr(0, at)));
  if (base == pipelines_.end() || !base->second.single) return nullptr;
  Pipeline served = base->second;
  served.name = name;
  served.pools = {name->substr(at + 1)};
  return &pipelines_.emplace(name, std::move(served)).first->second;
}

bool Plane::has_arrived(std::int64_t request) const {
  return request <= request_last_ && (requests_awaited_.empty() || !requests_awaited_.count(request));
}

void Plane::cancelled(const RequestCancelled& event, std::vector<Command>& commands) {
  if (!has_arrived(event.request))
    throw IllegalEvent("invariant 4: request " + text(event.request) + " was cancelled before it arrived");
  if (requests_.count(event.request)) end(event.request, End::kCancelled, commands);
}

void Plane::end(std::int64_t id, End how, std::vector<Command>& commands) {
  const std::vector<std::int64_t> live = std::move(requests_.at(id).tasks);
  requests_.erase(id);
  for (const std::int64_t task : live) {
    const Held held = tasks_.at(task);
    tasks_.erase(task);
    if (held.state == TaskState::kQueued) {
      if (how == End::kResponded) throw IllegalEvent("task " + text(task) + ": Respond cannot happen while queued");
      mechanism_.withdraw(task);
    } else if (held.state != TaskState::kLost) {  // what was lost is no longer on any replica
      mechanism_.dropped(task);
      commands.push_back(Cancel{held.replica, task});
    }
  }
  switch (how) {
    case End::kResponded:
      ++counts_.responded;
      break;
    case End::kRejected:
      ++counts_.rejected;
      break;
    case End::kCancelled:
      ++counts_.cancelled;
      break;
    case End::kFailed:
      ++counts_.failed;
      break;
  }
}

void Plane::fail(std::int64_t request, const std::string& reason, std::vector<Command>& commands) {
  end(request, End::kFailed, commands);
  commands.push_back(Fail{request, reason});
}

void Plane::admit(std::vector<Command>& commands) {
  std::vector<std::pair<std::size_t, std::vector<std::int64_t>>> by_pool;
  for (const std::int64_t task : arrivals_) {
    const Held* held = tasks_.find(task);
    if (!held) continue;  // cancelled within this step
    const std::size_t pool = held->pool;
    auto group = std::find_if(by_pool.begin(), by_pool.end(), [pool](const auto& g) { return g.first == pool; });
    if (group == by_pool.end()) group = by_pool.insert(by_pool.end(), {pool, {}});
    group->second.push_back(task);
  }
  for (auto& [pool, tasks] : by_pool) {
    // Some may have been refused with a task of their request for an earlier pool.
    tasks.erase(std::remove_if(tasks.begin(), tasks.end(), [this](std::int64_t t) { return !tasks_.count(t); }),
                tasks.end());
    if (tasks.empty()) continue;
    const std::vector<double> scores = policy_.admit->score(now_, mechanism_, pool, tasks);
    for (std::size_t i = 0; i < tasks.size(); ++i) {
      const std::int64_t request = request_of(tasks[i]);
      if (scores[i] == std::numeric_limits<double>::infinity() && requests_.count(request)) {
        end(request, End::kRejected, commands);
        commands.push_back(Reject{request, "admission: " + policy_.admit->name(), policy_.admit->retry_after_ns()});
      }
    }
  }
}

// --- tasks -----------------------------------------------------------------------------------------------------------

std::int64_t Plane::queue(Request& request, std::int64_t stage, std::int64_t attempt) {
  const RequestArrived& arrived = request.arrived;
  if (request.next_task >> kTaskBits)
    throw InvariantViolation("request " + text(arrived.request) + " made more than " + text(1 << kTaskBits) + " tasks");
  const std::int64_t task = arrived.request << kTaskBits | request.next_task++;
  const std::string& name = request.pipeline->pools[static_cast<std::size_t>(stage)];
  const auto known_pool = pools_.find(name);
  // A pool that no replica has joined yet: the task waits for one.
  const std::size_t pool = known_pool == pools_.end() ? add_pool(name, PoolKind::kLlm) : known_pool->second;
  const StageWork work =
      request.run ? request.run->work(stage, arrived.output_tokens_max)
                  : StageWork{arrived.input_tokens, request.pipeline->generates ? arrived.output_tokens_max : 0};
  std::int64_t predicted = 0;
  if (work.output_tokens_max) {
    try {
      predicted = policy_.predict->predict(arrived.request, arrived.tenant, arrived.kind, work.input_tokens,
                                           work.output_tokens_max);
    } catch (...) {
      blame_(policy_.name);
      throw;
    }
  }
  const Due due = this->due(request, stage);
  const Task spec{task,          stage, attempt, arrived.priority, now_, work.input_tokens, work.output_tokens_max,
                  arrived.prefix};
  request.tasks.push_back(task);
  tasks_.emplace(task, {spec, pool});
  mechanism_.enqueue(
      now_, pool,
      {task, arrived.request, arrived.kind, request.tenant, arrived.priority, attempt, arrived.scheduled_at, now_,
       due.ttft_at, due.at, work.input_tokens, work.output_tokens_max, predicted, arrived.prefix});
  return task;
}

Due Plane::due(const Request& request, std::int64_t stage) {
  const RequestArrived& arrived = request.arrived;
  const Due whole{arrived.ttft_due_at, arrived.due_at};
  if (!request.run || !request.pipeline->critical_path || std::min(whole.ttft_at, whole.at) == kNever) return whole;
  std::vector<Speed> speeds;
  speeds.reserve(request.pipeline->pools.size());
  for (const std::string& name : request.pipeline->pools) {
    const auto pool = pools_.find(name);
    speeds.push_back(pool == pools_.end() ? Speed{} : mechanism_.pool(pool->second).speed);
  }
  return request.run->due(stage, whole, arrived.output_tokens_max, speeds);
}

void Plane::dispatch(const std::vector<Decision>& decisions, std::vector<Command>& commands) {
  counts_.decisions += static_cast<std::int64_t>(decisions.size());
  const std::size_t begin = commands.size();  // one command a replica, in order of its first decision
  for (const Decision& decision : decisions) {
    const Task spec = send(decision.replica, decision.task);
    std::size_t at = begin;
    while (at < commands.size() && std::get<Dispatch>(commands[at]).replica != decision.replica) ++at;
    if (at == commands.size()) commands.push_back(Dispatch{decision.replica, {}});
    std::get<Dispatch>(commands[at]).tasks.push_back(spec);
  }
}

Task Plane::send(std::int64_t replica, std::int64_t task) {
  Held& held = tasks_.at(task);
  if (held.state != TaskState::kQueued)
    throw InvariantViolation("invariant 3: task " + text(task) + " was dispatched while " +
                             (held.state == TaskState::kStreaming ? "streaming" : "dispatched"));
  held.state = TaskState::kDispatched;
  held.replica = replica;
  return held.spec;
}

Plane::Held* Plane::known(std::int64_t task) {
  if (Held* found = tasks_.find(task)) return found;
  if (!has_arrived(request_of(task)))
    throw IllegalEvent("invariant 4: task " + text(task) + " belongs to no request that has arrived");
  return nullptr;  // it ended while the event was on its way
}

void Plane::only_from_flight(std::int64_t task, TaskState state, const char* trigger) {
  if (state == TaskState::kDispatched || state == TaskState::kStreaming) return;
  throw IllegalEvent("task " + text(task) + ": " + trigger + " cannot happen while " +
                     (state == TaskState::kQueued ? "queued" : "lost"));
}

void Plane::tokens(const TokensProduced& event) {
  Held* held = known(event.task);
  if (!held) return;
  if (held->state == TaskState::kDispatched) mechanism_.started(event.task);
  only_from_flight(event.task, held->state, "TokensProduced");
  if (event.count) held->state = TaskState::kStreaming;  // 0: its prompt has been read, and nobody saw a token
}

void Plane::finished(const TaskFinished& event, std::vector<Command>& commands) {
  const Held* found = known(event.task);
  if (!found) return;
  if (event.output_tokens < 0 || event.output_tokens > kTokensMaxOfRequest)
    throw IllegalEvent("task " + text(event.task) + " finished with " + text(event.output_tokens) + " output tokens");
  only_from_flight(event.task, found->state, "TaskFinished");
  mechanism_.finished(now_, event.task, event.output_tokens);
  const Held held = *found;
  tasks_.erase(event.task);
  const std::int64_t number = request_of(event.task);
  Request& request = requests_.at(number);
  forget(request, event.task);
  if (held.spec.output_tokens_max) {
    try {
      policy_.predict->observe(request.arrived.tenant, request.arrived.kind, event.output_tokens);
    } catch (...) {
      blame_(policy_.name);
      throw;
    }
  }
  if (request.run) {
    for (const std::int64_t stage : request.run->finished(held.spec.stage, event.output_tokens))
      queue(request, stage, 0);
    if (!request.run->done()) return;
  }
  end(number, End::kResponded, commands);
  commands.push_back(Respond{number});
}

void Plane::failed(const TaskFailed& event, std::vector<Command>& commands) {
  const Held* held = known(event.task);
  if (!held) return;
  const TaskState before = held->state;
  only_from_flight(event.task, before, "TaskFailed");
  mechanism_.dropped(event.task);
  again_or_fail(event.task, before, event.reason, event.retryable, commands);
}

void Plane::again_or_fail(std::int64_t task, TaskState before, const std::string& reason, bool retryable,
                          std::vector<Command>& commands) {
  const Held held = tasks_.at(task);
  tasks_.erase(task);
  const std::int64_t number = request_of(task);
  Request& request = requests_.at(number);
  forget(request, task);
  // Never again once the client has seen tokens; it sees none of a stage in between.
  const bool unseen = before == TaskState::kDispatched || !request.pipeline->answers(held.spec.stage);
  if (retryable && unseen && held.spec.attempt + 1 < attempts_max_) {
    ++counts_.retries;
    queue(request, held.spec.stage, held.spec.attempt + 1);
  } else {
    fail(number, reason, commands);
  }
}

void Plane::forget(Request& request, std::int64_t task) {
  request.tasks.erase(std::find(request.tasks.begin(), request.tasks.end(), task));
}

std::map<std::string, std::size_t> Plane::queue_depths() const {
  std::map<std::string, std::size_t> depths;
  for (const auto& [name, pool] : pools_) depths[name] = mechanism_.pool(pool).row_of.size();
  return depths;
}

// --- replicas and policy ---------------------------------------------------------------------------------------------

std::size_t Plane::add_pool(const std::string& name, PoolKind kind) {
  return pools_[name] = mechanism_.add_pool(name, kind);
}

void Plane::joined(const ReplicaJoined& event) {
  const std::string subject = "replica " + text(event.replica);
  const bool workers = event.pool_kind == static_cast<std::int64_t>(PoolKind::kOperator);  // no token budget
  if (event.tasks_max < 1 || event.batch_tokens_max < (workers ? 0 : 1))
    throw IllegalEvent(subject + ": tasks_max and batch_tokens_max must be from 1, got " + text(event.tasks_max) +
                       " and " + text(event.batch_tokens_max));
  if (replicas_.count(event.replica)) throw IllegalEvent(subject + " joined twice");
  const std::int64_t kind = pool_kinds_.emplace(event.pool, event.pool_kind).first->second;
  if (kind != event.pool_kind)
    throw IllegalEvent(subject + ": pool " + event.pool + " is " + pool_kind_name(kind) + ", not " +
                       pool_kind_name(event.pool_kind));
  const auto found = pools_.find(event.pool);
  std::size_t pool;
  if (found == pools_.end()) {
    pool = add_pool(event.pool, static_cast<PoolKind>(event.pool_kind));
  } else {
    pool = found->second;
    mechanism_.pool(pool).kind = static_cast<PoolKind>(event.pool_kind);
  }
  replicas_.emplace(event.replica, Replica{event.pool, ReplicaState::kServing});
  mechanism_.join(pool, {event.replica, event.device, event.tasks_max, event.batch_tokens_max, event.kv_tokens_max,
                         event.fixed_ns, event.input_token_ns, event.output_token_ns, event.output_seq_ns});
}

Plane::Replica& Plane::replica(std::int64_t id, const char* trigger) {
  const auto found = replicas_.find(id);
  if (found == replicas_.end()) throw IllegalEvent("replica " + text(id) + " is not known to the plane: " + trigger);
  if (found->second.state == ReplicaState::kLeft)
    throw IllegalEvent("replica " + text(id) + ": " + trigger + " cannot happen while left");
  return found->second;
}

void Plane::reported(const ReplicaReported& event) {
  const auto found = replicas_.find(event.replica);
  // The report was on its way when the replica left.
  if (found != replicas_.end() && found->second.state == ReplicaState::kLeft) return;
  replica(event.replica, "ReplicaReported");
  mechanism_.report(event.replica, now_, event.running, event.waiting, event.kv_blocks_free);
}

void Plane::draining(const ReplicaDraining& event) {
  replica(event.replica, "ReplicaDraining").state = ReplicaState::kDraining;
  mechanism_.drain(event.replica);
}

void Plane::left(const ReplicaLeft& event, std::vector<Command>& commands) {
  replica(event.replica, "ReplicaLeft").state = ReplicaState::kLeft;
  std::vector<std::pair<std::int64_t, TaskState>> before;
  for (const std::int64_t task : mechanism_.leave(event.replica)) {
    Held& held = tasks_.at(task);
    before.emplace_back(task, held.state);
    held.state = TaskState::kLost;
  }
  for (const auto& [task, state] : before)
    if (tasks_.count(task))  // else its request failed with another task of this replica
      again_or_fail(task, state, "replica " + text(event.replica) + " left", true, commands);
}

void Plane::ended(const RunEnded& event, std::vector<Command>& commands) {
  std::vector<std::int64_t> live;
  requests_.each([&live](std::int64_t request, const Request&) { live.push_back(request); });
  std::sort(live.begin(), live.end());
  for (const std::int64_t request : live) fail(request, event.reason, commands);
}

void Plane::bind(const std::string& name) {
  Policy policy = make_policy_(name);
  mechanism_.bind(now_, policy.order, policy.route, policy.limit);
  policy_ = std::move(policy);
}

}  // namespace sage
