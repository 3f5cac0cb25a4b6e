// The control plane: events in, commands out. Its meaning is sage_core/plane.py; tests/core/test_plane_stateful.py
// gives both the same events and wants the same commands. Policies written in Python, predictors and graphs of more
// than one stage come in through the small interfaces below.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "sage/id_map.hpp"
#include "sage/mechanism.hpp"
#include "sage/words.hpp"

namespace sage {

class Predict {
 public:
  virtual ~Predict() = default;
  virtual std::int64_t predict(std::int64_t request, Label tenant, std::int64_t kind, std::int64_t input_tokens,
                               std::int64_t output_tokens_max) = 0;
  virtual void observe(Label tenant, std::int64_t kind, std::int64_t output_tokens) = 0;
};

class Admit {
 public:
  virtual ~Admit() = default;
  // One score a task; infinity refuses it. NaN has been refused already.
  virtual std::vector<double> score(std::int64_t now, Mechanism& mechanism, std::size_t pool,
                                    const std::vector<std::int64_t>& tasks) = 0;
  virtual std::string name() const = 0;
  virtual std::int64_t retry_after_ns() const = 0;
};

struct Policy {
  std::string name;
  std::shared_ptr<Admit> admit;  // null: everybody comes in
  std::shared_ptr<Order> order;
  std::shared_ptr<Route> route;
  std::shared_ptr<Limit> limit;
  std::shared_ptr<Predict> predict;
};

struct StageWork {
  std::int64_t input_tokens, output_tokens_max;
};

struct Due {
  std::int64_t ttft_at, at;
};

// One request on its way through a graph of stages.
class Run {
 public:
  virtual ~Run() = default;
  virtual StageWork work(std::int64_t stage, std::int64_t output_tokens_cap) = 0;
  virtual std::vector<std::int64_t> finished(std::int64_t stage, std::int64_t output_tokens) = 0;  // stages now ready
  // When the first token and the result of a stage are due. speeds: of the pool of each stage.
  virtual Due due(std::int64_t stage, Due request, std::int64_t output_tokens_cap,
                  const std::vector<Speed>& speeds) = 0;
  virtual bool done() const = 0;
};

struct Pipeline {
  Label name;
  std::vector<std::string> pools;   // by stage
  std::vector<std::int64_t> first;  // stages that need nothing but the request
  // A single stage over the request as it is: no Run is made. generates: up to the client's cap, else nothing.
  bool single = false, generates = false;
  std::vector<bool> answering;  // by stage: whether its own tokens answer the request; empty: the only one does
  bool answers(std::int64_t stage) const { return answering.empty() || answering[static_cast<std::size_t>(stage)]; }
  bool critical_path = false;  // stages are due as early as what comes after them demands
  std::function<std::unique_ptr<Run>(std::int64_t input_tokens)> run;
};

struct Counts {
  std::int64_t arrived = 0, responded = 0, rejected = 0, cancelled = 0, failed = 0, retries = 0, decisions = 0;
};

class Plane {
 public:
  // make_policy: a fresh policy by name; throws for an unknown one. blame: called with an exception in flight that came
  // up while the policy was asked; throws another if it is the policy author's.
  Plane(std::vector<Pipeline> pipelines, std::function<Policy(const std::string&)> make_policy,
        const std::string& policy, std::int64_t attempts_max, std::function<void(const std::string&)> blame);

  void step(std::int64_t now, const std::vector<Event>& events, std::vector<Command>& commands);
  std::int64_t wakeup_at() const { return mechanism_.wakeup_at(); }
  std::size_t live() const { return requests_.size(); }
  std::size_t tasks_queued() const { return mechanism_.queued(); }
  std::map<std::string, std::size_t> queue_depths() const;  // by pool
  const std::string& policy() const { return policy_.name; }
  const Counts& counts() const { return counts_; }
  Mechanism& mechanism() { return mechanism_; }
  void check() const;

 private:
  enum class TaskState { kQueued, kDispatched, kStreaming, kLost };
  enum class ReplicaState { kServing, kDraining, kLeft };
  enum class End { kResponded, kRejected, kCancelled, kFailed };

  struct Request {
    RequestArrived arrived{};
    std::int64_t tenant = 0;
    const Pipeline* pipeline = nullptr;
    std::unique_ptr<Run> run;  // null for a single stage
    std::vector<std::int64_t> tasks;
    std::int64_t next_task = 0;
  };
  struct Held {
    Task spec{};
    std::size_t pool = 0;
    std::int64_t replica = -1;
    TaskState state = TaskState::kQueued;
  };
  struct Replica {
    std::string pool;
    ReplicaState state;
  };
  struct On;

  void arrived(const RequestArrived& event, std::vector<Command>& commands);
  // "chat@MODEL" is the single-stage pipeline "chat" on the pool MODEL, made when first asked for. Null: unknown.
  const Pipeline* pipeline_of(Label name);
  void cancelled(const RequestCancelled& event, std::vector<Command>& commands);
  void tokens(const TokensProduced& event);
  void finished(const TaskFinished& event, std::vector<Command>& commands);
  void failed(const TaskFailed& event, std::vector<Command>& commands);
  void reported(const ReplicaReported& event);
  void joined(const ReplicaJoined& event);
  void draining(const ReplicaDraining& event);
  void left(const ReplicaLeft& event, std::vector<Command>& commands);
  void ended(const RunEnded& event, std::vector<Command>& commands);

  void bind(const std::string& name);
  void admit(std::vector<Command>& commands);
  void dispatch(const std::vector<Decision>& decisions, std::vector<Command>& commands);
  Task send(std::int64_t replica, std::int64_t task);
  std::int64_t queue(Request& request, std::int64_t stage, std::int64_t attempt);
  void end(std::int64_t request, End how, std::vector<Command>& commands);
  void fail(std::int64_t request, const std::string& reason, std::vector<Command>& commands);
  void again_or_fail(std::int64_t task, TaskState before, const std::string& reason, bool retryable,
                     std::vector<Command>& commands);
  bool has_arrived(std::int64_t request) const;
  Held* known(std::int64_t task);
  Replica& replica(std::int64_t id, const char* trigger);
  std::size_t add_pool(const std::string& name, PoolKind kind);
  Due due(const Request& request, std::int64_t stage);
  static void only_from_flight(std::int64_t task, TaskState state, const char* trigger);
  static void forget(Request& request, std::int64_t task);

  std::unordered_map<Label, Pipeline> pipelines_;
  std::function<Policy(const std::string&)> make_policy_;
  std::function<void(const std::string&)> blame_;
  std::int64_t attempts_max_;
  Policy policy_;
  Mechanism mechanism_;
  std::unordered_map<std::string, std::size_t> pools_;
  std::unordered_map<std::string, std::int64_t> pool_kinds_;
  std::unordered_map<std::int64_t, Replica> replicas_;
  std::unordered_map<Label, std::int64_t> tenants_;
  IdMap<Request> requests_;
  IdMap<Held> tasks_;
  std::int64_t request_last_ = -1;
  std::unordered_set<std::int64_t> requests_awaited_;  // ids below it that have not arrived
  std::int64_t now_ = 0;
  std::vector<std::int64_t> arrivals_;  // tasks of requests that arrived in this step, for admission
  Counts counts_;
};

}  // namespace sage
