// The scheduling mechanism: queues, capacity, selection, routing, removal.
//
// What may be decided is here; what should be decided is the policy's (Order, Route, Limit). The meaning of every
// operation is sage_core/reference.py; tests/core/test_mechanism_differential.py holds the two together, ties and
// rounding included. Rules kept: a total order (score, then task id); in-step accounting (a task placed in this step
// counts at once); no arithmetic that another compiler could contract (the build says -ffp-contract=off).
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sage/id_map.hpp"

namespace sage {

inline constexpr std::int64_t kNever = INT64_MAX;

enum class PoolKind : std::int64_t { kLlm = 0, kEmbedding = 1, kOperator = 2 };

// What an order has worked out about one task; what the numbers mean is the order's own business.
struct Memo {
  std::int64_t a = 0, b = 0, c = 0;
};

// Queued tasks of one pool, one vector a column; row i is the same task in each. Rows are unordered (removal swaps).
struct TaskTable {
  std::vector<std::int64_t> task, request, kind, tenant, priority, attempt, arrived_at, queued_at, ttft_due_at, due_at,
      input_tokens, output_tokens_max, output_tokens, prefix;
  std::vector<Memo> memo;  // by Order::prepare
  std::size_t size() const { return task.size(); }
  void remove(std::size_t row);
};

// Serving (or draining) replicas of one pool, in order of joining.
struct ReplicaTable {
  std::vector<std::int64_t> replica, device, in_flight, device_in_flight, prefill_tokens, kv_tokens, tasks_max,
      batch_tokens_max, kv_tokens_max, running, waiting, kv_blocks_free, reported_at, last_dispatch;
  std::vector<double> fixed_ns, input_token_ns, output_token_ns, output_seq_ns, slowdown;
  std::size_t size() const { return replica.size(); }
  void move_row_to(std::size_t row, ReplicaTable& other);
  void erase(std::size_t row);
};

// One row a replica; or, with `equal`, one row for all of them: equal machines come in rows.
struct LimitTable {
  std::vector<std::int64_t> tasks_max, tasks_max_batch, prefill_tokens_max, kv_tokens_max, hold_until;
  void resize(std::size_t n);
  std::size_t row(std::size_t replica) const { return equal ? 0 : replica; }
  bool equal = false;
};

struct Pool;

class Order {
 public:
  virtual ~Order() = default;
  virtual bool is_static() const = 0;
  // Called when a task is queued, when this order is bound and when the pool's speed may have changed: what a score
  // needs of the task that stays the same until then. `score` finds it in pool.tasks.memo.
  virtual void prepare(const Pool&, std::size_t, Memo&) {}
  // out[i - begin] = score of row i of pool.tasks, begin <= i < end.
  virtual void score(std::int64_t now, const Pool& pool, std::size_t begin, std::size_t end, double* out) = 0;
  virtual std::string name() const = 0;
};

class Route {
 public:
  virtual ~Route() = default;
  // Native routes are live: out[r] = score of serving replica r for the task in `row`, this step's placements counted.
  virtual void score(std::int64_t now, const Pool& pool, std::size_t row, double* out) = 0;
  // Only a route written in Python may answer for many tasks at once (see Mechanism::place_matrix).
  virtual bool is_live() const { return true; }
  virtual double load_weight() const { return 0.0; }
  // Row-major (rows, serving replicas); only called when !is_live().
  virtual std::vector<double> score_matrix(std::int64_t now, const Pool& pool, const std::vector<std::size_t>& rows);
  virtual std::string name() const = 0;
};

class Limit {
 public:
  virtual ~Limit() = default;
  // Fills `out`, already resized to pool.serving.size().
  virtual void limit(std::int64_t now, const Pool& pool, LimitTable& out) = 0;
  virtual std::string name() const = 0;
};

struct Speed {
  double fixed_ns = 0.0, input_token_ns = 0.0, output_token_ns = 0.0;
};

// Shared, because a view of it that a policy kept may outlive the mechanism.
struct Pool : std::enable_shared_from_this<Pool> {
  std::string name;
  PoolKind kind = PoolKind::kLlm;
  TaskTable tasks;
  ReplicaTable serving, draining;
  Speed speed;             // of the fastest serving replica, cost by cost
  bool equal_room = true;  // every serving replica has the same tasks_max, batch_tokens_max and kv_tokens_max

  // Facts that policies would otherwise have to remember.
  std::vector<std::int64_t> tenant_service;  // by tenant index
  std::vector<std::int64_t> tenant_queued;
  std::int64_t service_floor = 0;  // service of the tenant that left the queue last
  std::int64_t dispatches = 0;
  std::int64_t bypassed = 0;
  std::int64_t input_tokens_queued = 0;
  std::int64_t urgent_queued = 0;  // tasks of priority <= 0

  IdMap<std::size_t> row_of;      // task -> row of tasks
  std::deque<std::int64_t> fifo;  // tasks as queued; those gone are dropped when they surface

  struct Scored {
    double score;
    std::int64_t task;
  };
  std::vector<Scored> heap_urgent,
      heap_batch;  // static order only; entries of tasks gone are dropped when they surface

  std::int64_t oldest() const;            // task queued longest, -1 when empty
  std::int64_t oldest_queued_at() const;  // kNever when empty
  std::int64_t earliest_due_at() const;   // over both objectives; kNever when none
  std::int64_t service_of(std::size_t row) const { return tenant_service[static_cast<std::size_t>(tasks.tenant[row])]; }
  void refresh_speed();
};

struct Decision {
  std::int64_t replica;
  std::int64_t task;
};

struct NewTask {
  std::int64_t task, request, kind, tenant, priority, attempt, arrived_at, queued_at, ttft_due_at, due_at, input_tokens,
      output_tokens_max, output_tokens, prefix;
};

struct NewReplica {
  std::int64_t replica, device, tasks_max, batch_tokens_max, kv_tokens_max;
  double fixed_ns, input_token_ns, output_token_ns, output_seq_ns;
};

class Mechanism {
 public:
  void bind(std::int64_t now, std::shared_ptr<Order> order, std::shared_ptr<Route> route, std::shared_ptr<Limit> limit);

  std::size_t add_pool(std::string name, PoolKind kind);
  void join(std::size_t pool, const NewReplica& replica);
  void drain(std::int64_t replica);
  std::vector<std::int64_t> leave(std::int64_t replica);  // the tasks that were on it, ascending
  void report(std::int64_t replica, std::int64_t now, std::int64_t running, std::int64_t waiting,
              std::int64_t kv_blocks_free);

  void enqueue(std::int64_t now, std::size_t pool, const NewTask& task);
  bool withdraw(std::int64_t task);                                                        // false: not queued
  void started(std::int64_t task);                                                         // first token seen
  std::int64_t finished(std::int64_t now, std::int64_t task, std::int64_t output_tokens);  // replica it was on
  std::int64_t dropped(std::int64_t task);                                                 // ditto, undone
  std::vector<Decision> decide(std::int64_t now);
  std::int64_t wakeup_at() const { return wakeup_at_; }

  Pool& pool(std::size_t index) { return *pools_.at(index); }
  const Pool& pool(std::size_t index) const { return *pools_.at(index); }
  std::size_t pools() const { return pools_.size(); }
  std::size_t queued() const;
  std::size_t in_flight() const { return in_flight_.size(); }
  void check() const;  // invariants 2 and 3 over the whole state; throws std::logic_error

 private:
  struct InFlight {
    std::size_t pool = 0;
    std::int64_t replica = -1, input_tokens = 0, kv_tokens = 0, dispatched_at = 0, in_flight_then = 0;
    double prefill_ns = 0.0;
    bool prefilling = false;
  };
  struct Candidate {
    double score;
    std::int64_t task;
    std::size_t row;
  };

  [[noreturn]] void refuse_nan(const Pool& pool, std::int64_t task, const double* scores, std::int64_t now) const;
  void decide_pool(std::int64_t now, std::size_t index, std::vector<Decision>& out);
  void speed_changed(Pool& pool);
  void score_dynamic(std::int64_t now, Pool& pool);
  bool next_dynamic(const Pool& pool, bool urgent, bool batch, Candidate& out);
  bool next_candidate(Pool& pool, bool urgent, bool batch, Candidate& out);
  void place(std::int64_t now, std::size_t index, std::size_t row, std::size_t r, std::vector<Decision>& out);
  void open_replicas(const Pool& pool, std::int64_t now);
  bool is_open(const Pool& pool, std::size_t r, std::int64_t now, bool urgent) const;
  void reopen(const Pool& pool, std::size_t r, std::int64_t now);
  void score_static(std::int64_t now, Pool& pool, std::size_t row);
  void forget(Pool& pool, std::size_t row);
  void remove_row(Pool& pool, std::size_t row);
  std::int64_t release(std::int64_t task, InFlight& flight);
  struct Place {  // of a replica
    std::size_t pool = 0;
    ReplicaTable* table = nullptr;
    std::size_t row = 0;
  };
  struct Device {
    std::int64_t in_flight = 0;
    std::vector<std::int64_t> replicas;
  };
  Place& place_of(std::int64_t replica);
  InFlight& flight_of(std::int64_t task);
  void index_replicas(std::size_t pool);
  void count_on_device(std::int64_t device, std::int64_t tasks);

  std::vector<std::shared_ptr<Pool>> pools_;
  IdMap<Place> places_;
  IdMap<std::size_t> pool_of_task_;  // queued
  IdMap<InFlight> in_flight_;
  IdMap<Device> devices_;
  std::shared_ptr<Order> order_;
  std::shared_ptr<Route> route_;
  std::shared_ptr<Limit> limit_;
  std::int64_t wakeup_at_ = kNever;

  // Scratch of one decision round.
  LimitTable limits_;
  std::vector<char> open_urgent_, open_batch_;
  std::size_t open_urgent_count_ = 0, open_batch_count_ = 0;
  std::vector<double> scores_;  // of all rows; inf where the row was taken in this round
  std::size_t scans_ = 0;       // candidates found by scanning scores_ in this round
  std::vector<double> route_scores_;
  std::vector<Candidate> candidates_;
  std::vector<std::size_t> placed_rows_;
  std::vector<std::int64_t> placed_here_;
};

}  // namespace sage
