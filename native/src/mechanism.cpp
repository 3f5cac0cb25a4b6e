#include "sage/mechanism.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <stdexcept>

#include "sage/errors.hpp"

namespace sage {
namespace {

constexpr std::size_t kMatrixRowsMax = 256;
constexpr std::size_t kScansMax = 4;
constexpr double kSlowdownGain = 0.125;
constexpr double kSlowdownLow = 0.125;
constexpr double kSlowdownHigh = 8.0;
constexpr double kInf = std::numeric_limits<double>::infinity();

struct ScoredAfter {  // heap comparator: the top is the lowest (score, task)
  template <class T>
  bool operator()(const T& a, const T& b) const {
    return a.score > b.score || (a.score == b.score && a.task > b.task);
  }
};

template <class T>
void swap_remove(std::vector<T>& column, std::size_t row) {
  column[row] = column.back();
  column.pop_back();
}

// The columns of each table, once, for whatever is done to all of them.
template <class Table, class F>
void each_task_column(Table& t, F&& f) {
  f(t.task), f(t.request), f(t.kind), f(t.tenant), f(t.priority), f(t.attempt), f(t.arrived_at), f(t.queued_at),
      f(t.ttft_due_at), f(t.due_at), f(t.input_tokens), f(t.output_tokens_max), f(t.output_tokens), f(t.prefix),
      f(t.memo);
}

template <class F>
void each_replica_column(ReplicaTable& a, ReplicaTable& b, F&& f) {
  f(a.replica, b.replica), f(a.device, b.device), f(a.in_flight, b.in_flight),
      f(a.device_in_flight, b.device_in_flight), f(a.prefill_tokens, b.prefill_tokens), f(a.kv_tokens, b.kv_tokens),
      f(a.tasks_max, b.tasks_max), f(a.batch_tokens_max, b.batch_tokens_max), f(a.kv_tokens_max, b.kv_tokens_max),
      f(a.running, b.running), f(a.waiting, b.waiting), f(a.kv_blocks_free, b.kv_blocks_free),
      f(a.reported_at, b.reported_at), f(a.last_dispatch, b.last_dispatch), f(a.fixed_ns, b.fixed_ns),
      f(a.input_token_ns, b.input_token_ns), f(a.output_token_ns, b.output_token_ns),
      f(a.output_seq_ns, b.output_seq_ns), f(a.slowdown, b.slowdown);
}

}  // namespace

void TaskTable::remove(std::size_t row) {
  each_task_column(*this, [row](auto& column) { swap_remove(column, row); });
}

void ReplicaTable::move_row_to(std::size_t row, ReplicaTable& other) {
  each_replica_column(*this, other, [row](auto& from, auto& to) { to.push_back(from[row]); });
  erase(row);
}

void ReplicaTable::erase(std::size_t row) {
  each_replica_column(*this, *this,
                      [row](auto& column, auto&) { column.erase(column.begin() + static_cast<std::ptrdiff_t>(row)); });
}

void LimitTable::resize(std::size_t n) {
  tasks_max.resize(n), tasks_max_batch.resize(n), prefill_tokens_max.resize(n), kv_tokens_max.resize(n),
      hold_until.resize(n);
}

std::vector<double> Route::score_matrix(std::int64_t, const Pool&, const std::vector<std::size_t>&) {
  throw std::logic_error("a live route is never asked for a matrix");
}

std::int64_t Pool::oldest() const { return fifo.empty() ? -1 : fifo.front(); }

std::int64_t Pool::oldest_queued_at() const { return fifo.empty() ? kNever : tasks.queued_at[row_of.at(fifo.front())]; }

std::int64_t Pool::earliest_due_at() const {
  std::int64_t due = kNever;
  for (std::size_t row = 0; row < tasks.size(); ++row)
    due = std::min(due, std::min(tasks.ttft_due_at[row], tasks.due_at[row]));
  return due;
}

void Pool::refresh_speed() {
  auto least = [](const std::vector<double>& column) {
    return column.empty() ? 0.0 : *std::min_element(column.begin(), column.end());
  };
  speed = {least(serving.fixed_ns), least(serving.input_token_ns), least(serving.output_token_ns)};
  const auto equal = [](const std::vector<std::int64_t>& column) {
    return std::adjacent_find(column.begin(), column.end(), std::not_equal_to<>()) == column.end();
  };
  equal_room = equal(serving.tasks_max) && equal(serving.batch_tokens_max) && equal(serving.kv_tokens_max);
}

// --- policy and membership -------------------------------------------------------------------------------------------

void Mechanism::bind(std::int64_t now, std::shared_ptr<Order> order, std::shared_ptr<Route> route,
                     std::shared_ptr<Limit> limit) {
  order_ = std::move(order), route_ = std::move(route), limit_ = std::move(limit);
  for (auto& pool : pools_) {
    pool->heap_urgent.clear(), pool->heap_batch.clear();
    for (std::size_t row = 0; row < pool->tasks.size(); ++row) order_->prepare(*pool, row, pool->tasks.memo[row]);
    if (order_->is_static())
      for (std::size_t row = 0; row < pool->tasks.size(); ++row) score_static(now, *pool, row);
  }
}

std::size_t Mechanism::add_pool(std::string name, PoolKind kind) {
  pools_.push_back(std::make_shared<Pool>());
  pools_.back()->name = std::move(name);
  pools_.back()->kind = kind;
  return pools_.size() - 1;
}

void Mechanism::join(std::size_t index, const NewReplica& r) {
  if (places_.count(r.replica)) throw IllegalEvent("replica " + std::to_string(r.replica) + " joined twice");
  Pool& pool = *pools_.at(index);
  ReplicaTable& t = pool.serving;
  t.replica.push_back(r.replica), t.device.push_back(r.device), t.tasks_max.push_back(r.tasks_max),
      t.batch_tokens_max.push_back(r.batch_tokens_max), t.kv_tokens_max.push_back(r.kv_tokens_max);
  for (auto* column : {&t.in_flight, &t.device_in_flight, &t.prefill_tokens, &t.kv_tokens, &t.running, &t.waiting,
                       &t.kv_blocks_free, &t.reported_at, &t.last_dispatch})
    column->push_back(0);
  t.fixed_ns.push_back(r.fixed_ns), t.input_token_ns.push_back(r.input_token_ns),
      t.output_token_ns.push_back(r.output_token_ns), t.output_seq_ns.push_back(r.output_seq_ns),
      t.slowdown.push_back(1.0);
  t.device_in_flight.back() = devices_[r.device].in_flight;
  devices_[r.device].replicas.push_back(r.replica);
  index_replicas(index);
  speed_changed(pool);
}

void Mechanism::drain(std::int64_t replica) {
  const Place at = place_of(replica);
  Pool& pool = *pools_[at.pool];
  if (at.table == &pool.serving) pool.serving.move_row_to(at.row, pool.draining);
  index_replicas(at.pool);
  speed_changed(pool);
}

void Mechanism::speed_changed(Pool& pool) {
  pool.refresh_speed();
  if (!order_) return;
  for (std::size_t row = 0; row < pool.tasks.size(); ++row) order_->prepare(pool, row, pool.tasks.memo[row]);
}

std::vector<std::int64_t> Mechanism::leave(std::int64_t replica) {
  const Place at = place_of(replica);
  std::vector<std::int64_t> lost;
  in_flight_.each([&](std::int64_t task, const InFlight& flight) {
    if (flight.replica == replica) lost.push_back(task);
  });
  std::sort(lost.begin(), lost.end());
  for (std::int64_t task : lost) release(task, in_flight_.at(task));
  auto& neighbours = devices_[at.table->device[at.row]].replicas;
  neighbours.erase(std::find(neighbours.begin(), neighbours.end(), replica));
  at.table->erase(at.row);
  places_.erase(replica);
  index_replicas(at.pool);
  speed_changed(*pools_[at.pool]);
  return lost;
}

void Mechanism::report(std::int64_t replica, std::int64_t now, std::int64_t running, std::int64_t waiting,
                       std::int64_t kv_blocks_free) {
  const Place& at = place_of(replica);
  at.table->running[at.row] = running, at.table->waiting[at.row] = waiting,
  at.table->kv_blocks_free[at.row] = kv_blocks_free, at.table->reported_at[at.row] = now;
}

Mechanism::Place& Mechanism::place_of(std::int64_t replica) {
  Place* place = places_.find(replica);
  if (!place) throw IllegalEvent("replica " + std::to_string(replica) + " is not known");
  return *place;
}

// After rows have moved: membership changes are rare, look-ups are not.
void Mechanism::index_replicas(std::size_t index) {
  Pool& pool = *pools_[index];
  for (ReplicaTable* table : {&pool.serving, &pool.draining})
    for (std::size_t row = 0; row < table->size(); ++row) places_[table->replica[row]] = {index, table, row};
}

void Mechanism::count_on_device(std::int64_t number, std::int64_t tasks) {
  Device& device = devices_[number];
  device.in_flight += tasks;
  for (std::int64_t replica : device.replicas) {
    const Place& at = place_of(replica);
    at.table->device_in_flight[at.row] = device.in_flight;
  }
}

// --- tasks -----------------------------------------------------------------------------------------------------------

void Mechanism::enqueue(std::int64_t now, std::size_t index, const NewTask& n) {
  Pool& pool = *pools_.at(index);
  if (in_flight_.count(n.task) || pool_of_task_.count(n.task))
    throw InvariantViolation("invariant 3: task " + std::to_string(n.task) + " is queued or in flight already");

  auto tenant = static_cast<std::size_t>(n.tenant);
  if (pool.tenant_service.size() <= tenant) {
    pool.tenant_service.resize(tenant + 1, 0);
    pool.tenant_queued.resize(tenant + 1, 0);
  }
  // A tenant that comes back does not collect credit for the time it asked for nothing (Sheng et al., OSDI'24).
  if (pool.tenant_queued[tenant] == 0) {
    std::int64_t lift = kNever;
    for (std::size_t i = 0; i < pool.tenant_queued.size(); ++i)
      if (pool.tenant_queued[i] > 0) lift = std::min(lift, pool.tenant_service[i]);
    if (lift == kNever) lift = pool.service_floor;
    pool.tenant_service[tenant] = std::max(pool.tenant_service[tenant], lift);
  }
  ++pool.tenant_queued[tenant];

  TaskTable& t = pool.tasks;
  std::size_t row = t.size();
  t.task.push_back(n.task), t.request.push_back(n.request), t.kind.push_back(n.kind), t.tenant.push_back(n.tenant),
      t.priority.push_back(n.priority), t.attempt.push_back(n.attempt), t.arrived_at.push_back(n.arrived_at),
      t.queued_at.push_back(n.queued_at), t.ttft_due_at.push_back(n.ttft_due_at), t.due_at.push_back(n.due_at),
      t.input_tokens.push_back(n.input_tokens), t.output_tokens_max.push_back(n.output_tokens_max),
      t.output_tokens.push_back(n.output_tokens), t.prefix.push_back(n.prefix), t.memo.emplace_back();
  pool.row_of[n.task] = row;
  pool_of_task_[n.task] = index;
  pool.fifo.push_back(n.task);
  pool.input_tokens_queued += n.input_tokens;
  if (n.priority <= 0) ++pool.urgent_queued;
  if (order_) order_->prepare(pool, row, t.memo[row]);
  if (order_ && order_->is_static()) score_static(now, pool, row);
}

void Mechanism::score_static(std::int64_t now, Pool& pool, std::size_t row) {
  double score;
  order_->score(now, pool, row, row + 1, &score);
  if (score != score)
    throw PolicyError("order " + order_->name() + ": score of task " + std::to_string(pool.tasks.task[row]) +
                      " is NaN at now=" + std::to_string(now));
  if (score == kInf) return;
  auto& heap = pool.tasks.priority[row] <= 0 ? pool.heap_urgent : pool.heap_batch;
  heap.push_back({score, pool.tasks.task[row]});
  std::push_heap(heap.begin(), heap.end(), ScoredAfter{});
}

// The task is no longer queued, but its row stays until remove_row: a round in progress holds row numbers.
void Mechanism::forget(Pool& pool, std::size_t row) {
  const TaskTable& t = pool.tasks;
  auto tenant = static_cast<std::size_t>(t.tenant[row]);
  if (--pool.tenant_queued[tenant] == 0) pool.service_floor = pool.tenant_service[tenant];
  pool.input_tokens_queued -= t.input_tokens[row];
  if (t.priority[row] <= 0) --pool.urgent_queued;
  pool.row_of.erase(t.task[row]);
  pool_of_task_.erase(t.task[row]);
  while (!pool.fifo.empty() && !pool.row_of.count(pool.fifo.front())) pool.fifo.pop_front();
}

void Mechanism::remove_row(Pool& pool, std::size_t row) {
  std::size_t last = pool.tasks.size() - 1;
  if (row != last) pool.row_of[pool.tasks.task[last]] = row;
  pool.tasks.remove(row);
}

bool Mechanism::withdraw(std::int64_t task) {
  const std::size_t* index = pool_of_task_.find(task);
  if (!index) return false;
  Pool& pool = *pools_[*index];
  std::size_t row = pool.row_of.at(task);
  forget(pool, row);
  remove_row(pool, row);
  return true;
}

Mechanism::InFlight& Mechanism::flight_of(std::int64_t task) {
  InFlight* flight = in_flight_.find(task);
  if (!flight) throw IllegalEvent("task " + std::to_string(task) + " is not in flight");
  return *flight;
}

void Mechanism::started(std::int64_t task) {
  InFlight& flight = flight_of(task);
  if (!flight.prefilling) return;
  flight.prefilling = false;
  const auto& [index, table, row] = place_of(flight.replica);
  table->prefill_tokens[row] -= flight.input_tokens;
}

std::int64_t Mechanism::finished(std::int64_t now, std::int64_t task, std::int64_t output_tokens) {
  InFlight& flight = flight_of(task);
  const auto& [index, table, row] = place_of(flight.replica);
  double per_token =
      table->output_token_ns[row] + table->output_seq_ns[row] * static_cast<double>(flight.in_flight_then);
  double expected = flight.prefill_ns + static_cast<double>(output_tokens) * per_token;
  if (expected > 0.0) {
    double ratio = static_cast<double>(now - flight.dispatched_at) / expected;
    ratio = std::min(std::max(ratio, kSlowdownLow), kSlowdownHigh);
    double& slowdown = table->slowdown[row];
    slowdown = slowdown + (ratio - slowdown) * kSlowdownGain;
  }
  return release(task, flight);
}

std::int64_t Mechanism::dropped(std::int64_t task) { return release(task, flight_of(task)); }

std::int64_t Mechanism::release(std::int64_t task, InFlight& flight) {
  const auto& [index, table, row] = place_of(flight.replica);
  --table->in_flight[row];
  table->kv_tokens[row] -= flight.kv_tokens;
  if (flight.prefilling) table->prefill_tokens[row] -= flight.input_tokens;
  count_on_device(table->device[row], -1);
  std::int64_t replica = flight.replica;
  in_flight_.erase(task);
  return replica;
}

std::size_t Mechanism::queued() const { return pool_of_task_.size(); }

// --- decisions -------------------------------------------------------------------------------------------------------

std::vector<Decision> Mechanism::decide(std::int64_t now) {
  std::vector<Decision> out;
  wakeup_at_ = kNever;
  for (std::size_t i = 0; i < pools_.size(); ++i)
    if (pools_[i]->tasks.size() > 0 && pools_[i]->serving.size() > 0) decide_pool(now, i, out);
  return out;
}

bool Mechanism::is_open(const Pool& pool, std::size_t r, std::int64_t now, bool urgent) const {
  const ReplicaTable& t = pool.serving;
  const std::size_t of = limits_.row(r);
  return now >= limits_.hold_until[of] && t.in_flight[r] < limits_.tasks_max[of] &&
         (urgent || t.in_flight[r] < limits_.tasks_max_batch[of]) &&
         t.prefill_tokens[r] < limits_.prefill_tokens_max[of] && t.kv_tokens[r] < limits_.kv_tokens_max[of];
}

void Mechanism::open_replicas(const Pool& pool, std::int64_t now) {
  std::size_t n = pool.serving.size();
  open_urgent_.assign(n, 0), open_batch_.assign(n, 0);
  open_urgent_count_ = open_batch_count_ = 0;
  for (std::size_t r = 0; r < n; ++r) {
    if (!is_open(pool, r, now, true)) continue;
    open_urgent_[r] = 1, ++open_urgent_count_;
    if (pool.serving.in_flight[r] < limits_.tasks_max_batch[limits_.row(r)]) open_batch_[r] = 1, ++open_batch_count_;
  }
}

void Mechanism::reopen(const Pool& pool, std::size_t r, std::int64_t now) {
  if (open_urgent_[r] && !is_open(pool, r, now, true)) open_urgent_[r] = 0, --open_urgent_count_;
  if (open_batch_[r] && !is_open(pool, r, now, false)) open_batch_[r] = 0, --open_batch_count_;
}

void Mechanism::score_dynamic(std::int64_t now, Pool& pool) {
  std::size_t n = pool.tasks.size();
  scores_.resize(n);
  order_->score(now, pool, 0, n, scores_.data());
  bool nan = false;
  for (std::size_t row = 0; row < n; ++row) nan |= scores_[row] != scores_[row];
  for (std::size_t row = 0; nan && row < n; ++row)
    if (scores_[row] != scores_[row])
      throw PolicyError("order " + order_->name() + ": score of task " + std::to_string(pool.tasks.task[row]) +
                        " is NaN at now=" + std::to_string(now));
  scans_ = 0;
}

// A round usually places one task or a few: those are found by scanning. Only a round that goes on makes a heap.
bool Mechanism::next_dynamic(const Pool& pool, bool urgent, bool batch, Candidate& out) {
  const TaskTable& t = pool.tasks;
  std::size_t n = scores_.size();
  auto has_room = [&](std::size_t row) { return t.priority[row] <= 0 ? urgent : batch; };
  if (scans_ < kScansMax) {
    ++scans_;
    out = {kInf, 0, n};
    for (std::size_t row = 0; row < n; ++row) {
      double score = scores_[row];
      if (!(score <= out.score) || score == kInf) continue;
      if ((score < out.score || t.task[row] < out.task) && has_room(row)) out = {score, t.task[row], row};
    }
    if (out.row == n) return false;
    scores_[out.row] = kInf;
    return true;
  }
  if (scans_ == kScansMax) {
    ++scans_;
    candidates_.clear();
    for (std::size_t row = 0; row < n; ++row)
      if (scores_[row] < kInf && has_room(row)) candidates_.push_back({scores_[row], t.task[row], row});
    std::make_heap(candidates_.begin(), candidates_.end(), ScoredAfter{});
  }
  while (!candidates_.empty()) {
    std::pop_heap(candidates_.begin(), candidates_.end(), ScoredAfter{});
    out = candidates_.back();
    candidates_.pop_back();
    if (has_room(out.row)) return true;
  }
  return false;
}

// The best candidate of the classes that have room; it leaves the heap.
bool Mechanism::next_candidate(Pool& pool, bool urgent, bool batch, Candidate& out) {
  if (!order_->is_static()) return next_dynamic(pool, urgent, batch, out);
  auto top = [&pool](std::vector<Pool::Scored>& heap) -> const Pool::Scored* {
    while (!heap.empty() && !pool.row_of.count(heap.front().task)) {  // withdrawn since
      std::pop_heap(heap.begin(), heap.end(), ScoredAfter{});
      heap.pop_back();
    }
    return heap.empty() ? nullptr : &heap.front();
  };
  const Pool::Scored* a = urgent ? top(pool.heap_urgent) : nullptr;
  const Pool::Scored* b = batch ? top(pool.heap_batch) : nullptr;
  if (!a && !b) return false;
  auto& heap = !b || (a && ScoredAfter{}(*b, *a)) ? pool.heap_urgent : pool.heap_batch;
  out = {heap.front().score, heap.front().task, pool.row_of.at(heap.front().task)};
  std::pop_heap(heap.begin(), heap.end(), ScoredAfter{});
  heap.pop_back();
  return true;
}

void Mechanism::refuse_nan(const Pool& pool, std::int64_t task, const double* scores, std::int64_t now) const {
  std::size_t r = 0;
  while (scores[r] == scores[r]) ++r;
  throw PolicyError("route " + route_->name() + ": score of task " + std::to_string(task) + " on replica " +
                    std::to_string(pool.serving.replica[r]) + " is NaN at now=" + std::to_string(now));
}

void Mechanism::decide_pool(std::int64_t now, std::size_t index, std::vector<Decision>& out) {
  Pool& pool = *pools_[index];
  std::size_t replicas = pool.serving.size();
  limits_.resize(replicas);
  limits_.equal = false;
  limit_->limit(now, pool, limits_);
  open_replicas(pool, now);

  // Rows move when a task is taken out, so tasks placed in this round are taken out when it is over. `placed_rows_`
  // keeps them; a task appears in the candidates once, so nothing is placed twice.
  placed_rows_.clear();
  std::vector<Candidate> skipped;  // static order: back into the heap afterwards
  auto has_urgent = [&] { return open_urgent_count_ > 0; };
  auto has_batch = [&] { return open_batch_count_ > 0; };
  auto best_of = [&](const Candidate& c, const double* scores) {
    const auto& open = pool.tasks.priority[c.row] <= 0 ? open_urgent_ : open_batch_;
    std::size_t best = replicas;
    double least = kInf;
    bool nan = false;
    for (std::size_t r = 0; r < replicas; ++r) {
      nan |= scores[r] != scores[r];
      if (scores[r] < least && open[r]) least = scores[r], best = r;
    }
    if (nan) refuse_nan(pool, c.task, scores, now);
    return best;
  };
  auto put = [&](const Candidate& c, std::size_t r) {
    place(now, index, c.row, r, out);
    placed_rows_.push_back(c.row);
    reopen(pool, r, now);
  };

  std::size_t urgent_left = pool.urgent_queued > 0 ? static_cast<std::size_t>(pool.urgent_queued) : 0;
  bool batch_left = pool.tasks.size() > urgent_left;
  if ((has_urgent() && urgent_left > 0) || (has_batch() && batch_left)) {
    if (!order_->is_static()) score_dynamic(now, pool);
    Candidate c;
    if (route_->is_live()) {
      route_scores_.resize(replicas);
      while (has_urgent() && next_candidate(pool, has_urgent(), has_batch(), c)) {
        route_->score(now, pool, c.row, route_scores_.data());
        std::size_t r = best_of(c, route_scores_.data());
        if (r < replicas)
          put(c, r);
        else
          skipped.push_back(c);
      }
    } else {
      placed_here_.assign(replicas, 0);
      std::vector<Candidate> chunk;
      std::vector<std::size_t> rows;
      for (;;) {
        chunk.clear(), rows.clear();
        bool urgent = has_urgent(), batch = has_batch();
        while (urgent && chunk.size() < kMatrixRowsMax && next_candidate(pool, urgent, batch, c))
          chunk.push_back(c), rows.push_back(c.row);
        if (chunk.empty()) break;
        std::vector<double> matrix = route_->score_matrix(now, pool, rows);
        for (std::size_t i = 0; i < chunk.size(); ++i) {
          double* scores = matrix.data() + i * replicas;
          for (std::size_t r = 0; r < replicas; ++r)
            scores[r] = scores[r] + route_->load_weight() * static_cast<double>(placed_here_[r]);
          std::size_t r = best_of(chunk[i], scores);
          if (r < replicas)
            put(chunk[i], r), ++placed_here_[r];
          else
            skipped.push_back(chunk[i]);
        }
      }
    }
  }

  if (order_->is_static())
    for (const Candidate& c : skipped) {
      auto& heap = pool.tasks.priority[c.row] <= 0 ? pool.heap_urgent : pool.heap_batch;
      heap.push_back({c.score, c.task});
      std::push_heap(heap.begin(), heap.end(), ScoredAfter{});
    }
  // From the last row down: the row that fills the hole is never one that is still to be taken out.
  std::sort(placed_rows_.begin(), placed_rows_.end());
  for (std::size_t i = placed_rows_.size(); i-- > 0;) remove_row(pool, placed_rows_[i]);

  if (pool.tasks.size() > 0)
    for (std::size_t r = 0; r < replicas; ++r) {
      const std::int64_t hold_until = limits_.hold_until[limits_.row(r)];
      if (hold_until > now) wakeup_at_ = std::min(wakeup_at_, hold_until);
    }
}

void Mechanism::place(std::int64_t now, std::size_t index, std::size_t row, std::size_t r, std::vector<Decision>& out) {
  Pool& pool = *pools_[index];
  const TaskTable& t = pool.tasks;
  ReplicaTable& s = pool.serving;
  std::int64_t task = t.task[row], input = t.input_tokens[row], output = t.output_tokens[row];
  if (!is_open(pool, r, now, t.priority[row] <= 0))
    throw InvariantViolation("invariant 2: task " + std::to_string(task) + " placed on replica " +
                             std::to_string(s.replica[r]) + ", which is not open to it");

  if (task == pool.oldest())
    pool.bypassed = 0;
  else
    ++pool.bypassed;
  forget(pool, row);
  double prefill_ns = s.fixed_ns[r] + s.input_token_ns[r] * static_cast<double>(s.prefill_tokens[r] + input);
  ++s.in_flight[r];
  s.prefill_tokens[r] += input;
  s.kv_tokens[r] += input + output;
  s.last_dispatch[r] = ++pool.dispatches;
  count_on_device(s.device[r], 1);
  pool.tenant_service[static_cast<std::size_t>(t.tenant[row])] += input + 2 * output;
  in_flight_.emplace(task, {index, s.replica[r], input, input + output, now, s.in_flight[r], prefill_ns, true});
  out.push_back({s.replica[r], task});
}

void Mechanism::check() const {
  for (const auto& pool : pools_)
    for (const ReplicaTable* table : {&pool->serving, &pool->draining})
      for (std::size_t row = 0; row < table->size(); ++row) {
        std::int64_t tasks = 0, kv = 0, prefill = 0;
        in_flight_.each([&](std::int64_t, const InFlight& flight) {
          if (flight.replica == table->replica[row])
            ++tasks, kv += flight.kv_tokens, prefill += flight.prefilling ? flight.input_tokens : 0;
        });
        if (tasks != table->in_flight[row] || kv != table->kv_tokens[row] || prefill != table->prefill_tokens[row])
          throw InvariantViolation("invariant 2: replica " + std::to_string(table->replica[row]) +
                                   " does not hold what it counts");
      }
  pool_of_task_.each([this](std::int64_t task, std::size_t) {
    if (in_flight_.count(task)) throw InvariantViolation("invariant 3: a task is queued and in flight");
  });
}

}  // namespace sage
