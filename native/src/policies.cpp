// Native twins of the orders, routes and limits in policies/sage_policies.
//
// The Python class of the same name is the meaning; tests/policies/test_native_twins.py compares every score and limit
// bit by bit. Rules kept: the operations of the Python expression in its order; instants and spans in whole ns wherever
// Python has them so; no powers, sums over rows or transcendental functions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <utility>

#include "sage/mechanism.hpp"

namespace py = pybind11;

namespace {

using sage::kNever;
using sage::LimitTable;
using sage::Pool;
using sage::PoolKind;
using sage::ReplicaTable;
using sage::TaskTable;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kClassSpanNs = 0x1p50;            // order.py CLASS_SPAN_NS
constexpr double kInstantNsMax = 0x1p50 - 0x1p30;  // order.py INSTANT_NS_MAX
constexpr double kNoDueNs = 0x1p52;                // order.py NO_DUE_NS
constexpr std::int64_t kTierNs = 1LL << 52;        // hybrid.py TIER_NS
constexpr std::int64_t kDueNsMax = 1LL << 50;      // hybrid.py INSTANT_NS_MAX
constexpr double kSpanNsMax = 0x1p48;              // hybrid.py SPAN_NS_MAX
constexpr double kShareMax = 0x1p62;               // limit.py share_of

double real(std::int64_t value) { return static_cast<double>(value); }

// std::floor of values that fit; plain x86-64 would call into libm.
std::int64_t floor_of(double value) {
  const auto towards_zero = static_cast<std::int64_t>(value);
  return towards_zero - (real(towards_zero) > value ? 1 : 0);
}

// Rounded down to whole ns, within kSpanNsMax either way.
std::int64_t whole(double span_ns) { return floor_of(std::min(std::max(span_ns, -kSpanNsMax), kSpanNsMax)); }

std::int64_t share_of(std::int64_t count, double factor) {
  return static_cast<std::int64_t>(std::min(std::max(std::floor(real(count) * factor), 1.0), kShareMax));
}

// --- orders ----------------------------------------------------------------------------------------------------------

class Fifo : public sage::Order {
 public:
  bool is_static() const override { return true; }
  std::string name() const override { return "Fifo"; }
  void score(std::int64_t, const Pool& pool, std::size_t begin, std::size_t end, double* out) override {
    for (std::size_t i = begin; i < end; ++i) out[i - begin] = real(pool.tasks.arrived_at[i]);
  }
};

class PriorityOrder : public sage::Order {
 public:
  bool is_static() const override { return true; }
  std::string name() const override { return "PriorityOrder"; }
  void score(std::int64_t, const Pool& pool, std::size_t begin, std::size_t end, double* out) override {
    const TaskTable& t = pool.tasks;
    for (std::size_t i = begin; i < end; ++i) {
      double arrived = std::min(real(t.arrived_at[i]), kInstantNsMax);
      out[i - begin] = real(t.priority[i]) * kClassSpanNs + arrived;
    }
  }
};

class EarliestDeadline : public sage::Order {
 public:
  bool is_static() const override { return true; }
  std::string name() const override { return "EarliestDeadline"; }
  void score(std::int64_t, const Pool& pool, std::size_t begin, std::size_t end, double* out) override {
    const TaskTable& t = pool.tasks;
    for (std::size_t i = begin; i < end; ++i) {
      std::int64_t due = std::min(t.ttft_due_at[i], t.due_at[i]);
      double instant = real(due < kNever ? due : t.arrived_at[i]);
      out[i - begin] = std::min(instant, kNoDueNs - 1.0) + (due < kNever ? 0.0 : kNoDueNs);
    }
  }
};

struct HybridOrderConfig {
  bool laxity;
  std::array<std::int64_t, 3> budget_ns;  // by RequestKind
  std::int64_t priority_spacing_ns;       // 0: classes off
  bool demotion;
  double late_margin;
  bool starvation;
  std::int64_t starvation_ns, starvation_bypass;
  double fairness_weight;  // 0: fairness off
  std::int64_t fairness_cap_ns;
  double work_weight;  // 0: shortest off
};

class HybridOrder : public sage::Order {
 public:
  explicit HybridOrder(const HybridOrderConfig& config) : c_(config) {}
  bool is_static() const override { return false; }
  std::string name() const override { return "HybridOrder"; }

  // A task's score, less `now` and what its tenant was overserved, stays the same while it is on time, and again once
  // it is late: only the instant between the two has to be watched.
  void prepare(const Pool& pool, std::size_t i, sage::Memo& out) override {
    const TaskTable& t = pool.tasks;
    const auto [start_by, late_after] = latest_start(t, i, pool.speed);
    const std::int64_t offset = whole(real(t.priority[i]) * real(c_.priority_spacing_ns));
    const double work_tokens = real(t.input_tokens[i]) + 2.0 * real(t.output_tokens[i]);
    const std::int64_t cost = whole(c_.work_weight * pool.speed.input_token_ns * work_tokens);
    out.a = (c_.laxity ? start_by : t.arrived_at[i]) + offset + cost;
    out.b = c_.demotion ? late_after : kNever;
    out.c = kTierNs + t.arrived_at[i] + offset;
  }

  void score(std::int64_t now, const Pool& pool, std::size_t begin, std::size_t end, double* out) override {
    const TaskTable& t = pool.tasks;
    weigh_tenants(pool);
    for (std::size_t i = begin; i < end; ++i) {
      const sage::Memo& memo = t.memo[i];
      const std::int64_t on_time = memo.a + overserved_[static_cast<std::size_t>(t.tenant[i])];
      out[i - begin] = real((now > memo.b ? memo.c : on_time) - now);
    }
    promote_starving(now, pool, begin, end, out);
  }

 private:
  struct Starts {
    std::int64_t start_by;    // latest instant at which an idle replica must start
    std::int64_t late_after;  // kNever without objectives
  };

  Starts latest_start(const TaskTable& t, std::size_t i, const sage::Speed& speed) const {
    const std::int64_t prefill = whole(speed.fixed_ns + speed.input_token_ns * real(t.input_tokens[i]));
    const std::int64_t work = prefill + whole(speed.output_token_ns * real(t.output_tokens[i]));
    Starts starts{kNever, kNever};
    auto objective = [&](std::int64_t due_at, std::int64_t needed) {
      if (due_at == kNever) return;
      const std::int64_t latest = std::min(due_at, kDueNsMax) - needed;
      const std::int64_t allowed = std::min(due_at, kDueNsMax) - t.arrived_at[i];
      const std::int64_t margin = whole(c_.late_margin * real(allowed));
      starts.start_by = std::min(starts.start_by, latest);
      starts.late_after = std::min(starts.late_after, latest - margin);
    };
    objective(t.ttft_due_at[i], prefill);
    objective(t.due_at[i], work);
    if (starts.start_by == kNever) {
      const std::int64_t soft_due_at = t.arrived_at[i] + c_.budget_ns[static_cast<std::size_t>(t.kind[i])];
      starts.start_by = std::min(soft_due_at, kDueNsMax) - work;
    }
    return starts;
  }

  // Laxity given to each tenant queued, by tenant index.
  void weigh_tenants(const Pool& pool) {
    const std::size_t tenants = pool.tenant_service.size();
    overserved_.assign(tenants, 0);
    const double token_ns = c_.fairness_weight * pool.speed.input_token_ns, cap = real(c_.fairness_cap_ns);
    if (token_ns == 0.0) return;
    std::int64_t least = kNever;
    for (std::size_t i = 0; i < tenants; ++i)
      if (pool.tenant_queued[i] > 0) least = std::min(least, pool.tenant_service[i]);
    for (std::size_t i = 0; i < tenants; ++i)
      if (pool.tenant_queued[i] > 0)
        overserved_[i] = floor_of(std::min(real(pool.tenant_service[i] - least) * token_ns, cap));
  }

  void promote_starving(std::int64_t now, const Pool& pool, std::size_t begin, std::size_t end, double* out) const {
    if (!c_.starvation || pool.bypassed < c_.starvation_bypass) return;
    const std::size_t* found = pool.row_of.find(pool.oldest());
    if (!found) return;
    const std::size_t row = *found;
    if (row < begin || row >= end) return;
    if (now - pool.tasks.queued_at[row] > c_.starvation_ns) out[row - begin] = real(-kTierNs);
  }

  HybridOrderConfig c_;
  std::vector<std::int64_t> overserved_;  // scratch
};

// --- routes ----------------------------------------------------------------------------------------------------------

// A score that is one of the counted columns, the same for every task.
class ColumnRoute : public sage::Route {
 public:
  using Column = std::vector<std::int64_t> ReplicaTable::*;
  ColumnRoute(std::string name, Column column) : name_(std::move(name)), column_(column) {}
  std::string name() const override { return name_; }
  void score(std::int64_t, const Pool& pool, std::size_t, double* out) override {
    const std::vector<std::int64_t>& column = pool.serving.*column_;
    for (std::size_t r = 0; r < column.size(); ++r) out[r] = real(column[r]);
  }

 private:
  std::string name_;
  Column column_;
};

struct RoundRobin : ColumnRoute {
  RoundRobin() : ColumnRoute("RoundRobin", &ReplicaTable::last_dispatch) {}
};
struct LeastInFlight : ColumnRoute {
  LeastInFlight() : ColumnRoute("LeastInFlight", &ReplicaTable::in_flight) {}
};
struct LeastOutstandingTokens : ColumnRoute {
  LeastOutstandingTokens() : ColumnRoute("LeastOutstandingTokens", &ReplicaTable::kv_tokens) {}
};

class PredictedFinish : public sage::Route {
 public:
  explicit PredictedFinish(double share_penalty) : share_penalty_(share_penalty) {}
  std::string name() const override { return "PredictedFinish"; }
  void score(std::int64_t, const Pool& pool, std::size_t row, double* out) override {
    const ReplicaTable& s = pool.serving;
    const std::int64_t input = pool.tasks.input_tokens[row];
    const double output = real(pool.tasks.output_tokens[row]);
    const double shared = 1.0 + share_penalty_;
    const std::size_t replicas = s.size();
    for (std::size_t r = 0; r < replicas; ++r) {
      const double in_flight = real(s.in_flight[r]);  // whole numbers below 2^53: adding 1.0 is exact
      const double others =
          s.input_token_ns[r] * real(s.prefill_tokens[r]) + output * (s.output_seq_ns[r] * (in_flight + 1.0));
      const double own = (s.fixed_ns[r] + s.input_token_ns[r] * real(input)) + output * s.output_token_ns[r];
      const double share = s.device_in_flight[r] > s.in_flight[r] ? shared : 1.0;
      out[r] = (others * s.slowdown[r] + own) * share + in_flight;
    }
  }

 private:
  double share_penalty_;
};

// --- limits ----------------------------------------------------------------------------------------------------------

void set(LimitTable& out, std::size_t r, std::int64_t tasks, std::int64_t batch, std::int64_t prefill, std::int64_t kv,
         std::int64_t hold_until) {
  out.tasks_max[r] = tasks, out.tasks_max_batch[r] = batch, out.prefill_tokens_max[r] = prefill;
  out.kv_tokens_max[r] = kv, out.hold_until[r] = hold_until;
}

class EngineLimit : public sage::Limit {
 public:
  explicit EngineLimit(std::optional<double> factor) : factor_(factor) {}
  std::string name() const override { return "EngineLimit"; }
  void limit(std::int64_t, const Pool& pool, LimitTable& out) override {
    for (std::size_t r = 0; r < pool.serving.size(); ++r) {
      const std::int64_t tasks = factor_ ? share_of(pool.serving.tasks_max[r], *factor_) : kNever;
      set(out, r, tasks, tasks, kNever, kNever, 0);
    }
  }

 private:
  std::optional<double> factor_;
};

class Partition : public sage::Limit {
 public:
  Partition(std::shared_ptr<sage::Limit> inner, std::vector<std::int64_t> llm, std::vector<std::int64_t> embedding)
      : inner_(std::move(inner)), llm_devices_(std::move(llm)), embedding_devices_(std::move(embedding)) {
    std::sort(llm_devices_.begin(), llm_devices_.end());
    std::sort(embedding_devices_.begin(), embedding_devices_.end());
  }
  std::string name() const override { return "Partition"; }
  void limit(std::int64_t now, const Pool& pool, LimitTable& out) override {
    inner_->limit(now, pool, out);
    if (pool.kind == PoolKind::kOperator) return;
    if (out.equal) {  // the first row stands for all, which differ now
      for (std::size_t r = 1; r < pool.serving.size(); ++r)
        set(out, r, out.tasks_max[0], out.tasks_max_batch[0], out.prefill_tokens_max[0], out.kv_tokens_max[0],
            out.hold_until[0]);
      out.equal = false;
    }
    const auto& others = pool.kind == PoolKind::kLlm ? embedding_devices_ : llm_devices_;
    for (std::size_t r = 0; r < pool.serving.size(); ++r)
      if (std::binary_search(others.begin(), others.end(), pool.serving.device[r]))
        out.tasks_max[r] = out.tasks_max_batch[r] = 0;
  }

 private:
  std::shared_ptr<sage::Limit> inner_;
  std::vector<std::int64_t> llm_devices_, embedding_devices_;
};

constexpr double kFixedTimes = 10.0;               // FIXED_TIMES of sage_policies.hybrid
constexpr double kTokensMax = 9007199254740992.0;  // 2^53: more than any batch has

struct HybridLimitConfig {
  bool in_flight_limits;
  double reserve, prefill_depth, kv_fill;
  bool embedding_batches;
  std::int64_t batch_ns, window_ns, margin_ns, starvation_ns;
  std::int64_t tpot_ns;  // 0: no limit by it
};

class HybridLimit : public sage::Limit {
 public:
  explicit HybridLimit(const HybridLimitConfig& config) : c_(config) {}
  std::string name() const override { return "HybridLimit"; }

  void limit(std::int64_t now, const Pool& pool, LimitTable& out) override {
    const ReplicaTable& s = pool.serving;
    if (pool.kind == PoolKind::kLlm && c_.in_flight_limits) {
      const bool starving = now - pool.oldest_queued_at() > c_.starvation_ns;
      out.equal = pool.equal_room;
      for (std::size_t r = 0; out.equal && r < s.size(); ++r) out.equal = fits(s, r);
      for (std::size_t r = 0; r < (out.equal ? 1 : s.size()); ++r) {
        const std::int64_t tasks = fits(s, r) ? s.tasks_max[r] : tasks_within_tpot(s, r);
        set(out, r, tasks, starving ? tasks : share_of(tasks, 1.0 - c_.reserve),
            s.batch_tokens_max[r] > 0 ? share_of(s.batch_tokens_max[r], c_.prefill_depth) : kNever,
            s.kv_tokens_max[r] > 0 ? share_of(s.kv_tokens_max[r], c_.kv_fill) : kNever, 0);
      }
    } else if (pool.kind == PoolKind::kEmbedding && c_.embedding_batches) {
      const std::int64_t earliest_due_at = pool.earliest_due_at();  // looks at every queued task
      for (std::size_t r = 0; r < s.size(); ++r) {
        const std::int64_t batches = s.in_flight[r] > 0 ? 2 : 1;
        const std::int64_t tasks = batches * s.tasks_max[r];
        const std::int64_t full = batch_tokens(s, r);
        std::int64_t tokens = full < kNever ? batches * std::min(full, kNever / 2) : kNever;
        if (s.in_flight[r] == 1)
          tokens = std::max(tokens, s.prefill_tokens[r] + 1);  // room behind one text, however long
        set(out, r, tasks, tasks, tokens, kNever, opens_at(now, pool, r, earliest_due_at));
      }
    } else {
      for (std::size_t r = 0; r < s.size(); ++r) set(out, r, s.tasks_max[r], s.tasks_max[r], kNever, kNever, 0);
    }
  }

 private:
  // Whether the replica full to its own maximum still keeps the time per output token, or nothing is known of it.
  bool fits(const ReplicaTable& s, std::size_t r) const {
    if (c_.tpot_ns == 0 || s.output_seq_ns[r] <= 0.0) return true;
    return (s.output_token_ns[r] + s.output_seq_ns[r] * real(s.tasks_max[r])) * s.slowdown[r] <= real(c_.tpot_ns);
  }

  std::int64_t tasks_within_tpot(const ReplicaTable& s, std::size_t r) const {
    const double tasks = std::floor((real(c_.tpot_ns) / s.slowdown[r] - s.output_token_ns[r]) / s.output_seq_ns[r]);
    return static_cast<std::int64_t>(std::min(std::max(tasks, 1.0), real(s.tasks_max[r])));
  }

  // Tokens of a full batch of embeddings, at least 1; kNever where neither the engine's size nor its speed is known.
  std::int64_t batch_tokens(const ReplicaTable& s, std::size_t r) const {
    const std::int64_t of_engine = s.batch_tokens_max[r] > 0 ? s.batch_tokens_max[r] : kNever;
    if (c_.batch_ns == 0 || s.input_token_ns[r] <= 0.0) return of_engine;
    const double batch_ns = std::max(real(c_.batch_ns), kFixedTimes * s.fixed_ns[r]);
    const double in_time = std::max(batch_ns / s.input_token_ns[r], 1.0);
    return in_time < kTokensMax ? std::min(of_engine, static_cast<std::int64_t>(in_time)) : of_engine;
  }

  std::int64_t opens_at(std::int64_t now, const Pool& pool, std::size_t r, std::int64_t earliest_due_at) const {
    const ReplicaTable& s = pool.serving;
    const std::int64_t tokens_max = batch_tokens(s, r);
    if (s.in_flight[r] == 0) return 0;
    if (static_cast<std::int64_t>(pool.tasks.size()) >= s.tasks_max[r] || pool.input_tokens_queued >= tokens_max)
      return 0;
    const std::int64_t oldest = pool.oldest_queued_at();
    std::int64_t at = oldest > kNever - c_.window_ns ? kNever : oldest + c_.window_ns;
    if (earliest_due_at == kNever) return at;
    const double tokens = real(std::min(pool.input_tokens_queued, tokens_max));
    const auto batch_ns = static_cast<std::int64_t>(std::ceil(s.fixed_ns[r] + s.input_token_ns[r] * tokens));
    const std::int64_t latest = earliest_due_at - batch_ns;
    return latest >= now ? std::min(at, latest - c_.margin_ns) : at;
  }

  HybridLimitConfig c_;
};

// --- what a test or a tool may ask of one part -----------------------------------------------------------------------

template <class T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple order_scores(sage::Order& order, std::int64_t now, sage::Mechanism& mechanism, std::size_t index) {
  Pool& pool = mechanism.pool(index);
  std::vector<sage::Memo> memo = pool.tasks.memo;  // of the bound order, which need not be this one
  for (std::size_t row = 0; row < memo.size(); ++row) order.prepare(pool, row, pool.tasks.memo[row]);
  std::vector<double> scores(pool.tasks.size());
  order.score(now, pool, 0, scores.size(), scores.data());
  pool.tasks.memo = std::move(memo);
  return py::make_tuple(array_of(pool.tasks.task), array_of(scores));
}

py::array_t<double> route_scores(sage::Route& route, std::int64_t now, sage::Mechanism& mechanism, std::size_t index,
                                 std::int64_t task) {
  const Pool& pool = mechanism.pool(index);
  const std::size_t* found = pool.row_of.find(task);
  if (!found) throw py::key_error("task " + std::to_string(task) + " is not queued in this pool");
  std::vector<double> scores(pool.serving.size());
  route.score(now, pool, *found, scores.data());
  return array_of(scores);
}

py::tuple limits(sage::Limit& limit, std::int64_t now, sage::Mechanism& mechanism, std::size_t index) {
  const Pool& pool = mechanism.pool(index);
  LimitTable out;
  out.resize(pool.serving.size());
  limit.limit(now, pool, out);
  for (std::size_t r = 0; out.equal && r < pool.serving.size(); ++r)
    set(out, r, out.tasks_max[0], out.tasks_max_batch[0], out.prefill_tokens_max[0], out.kv_tokens_max[0],
        out.hold_until[0]);
  return py::make_tuple(array_of(out.tasks_max), array_of(out.tasks_max_batch), array_of(out.prefill_tokens_max),
                        array_of(out.kv_tokens_max), array_of(out.hold_until));
}

template <class T, class Base>
using PartClass = py::class_<T, Base, std::shared_ptr<T>>;

}  // namespace

void register_policies(py::module_& m) {
  PartClass<Fifo, sage::Order>(m, "Fifo", "Twin of sage_policies.order.Fifo.").def(py::init<>());
  PartClass<PriorityOrder, sage::Order>(m, "PriorityOrder", "Twin of sage_policies.order.PriorityOrder.")
      .def(py::init<>());
  PartClass<EarliestDeadline, sage::Order>(m, "EarliestDeadline", "Twin of sage_policies.order.EarliestDeadline.")
      .def(py::init<>());
  PartClass<HybridOrder, sage::Order>(m, "HybridOrder", "Twin of sage_policies.hybrid.HybridOrder.")
      .def(py::init([](bool laxity, std::array<std::int64_t, 3> budget_ns, std::int64_t priority_spacing_ns,
                       bool demotion, double late_margin, bool starvation, std::int64_t starvation_ns,
                       std::int64_t starvation_bypass, double fairness_weight, std::int64_t fairness_cap_ns,
                       double work_weight) {
             return std::make_shared<HybridOrder>(
                 HybridOrderConfig{laxity, budget_ns, priority_spacing_ns, demotion, late_margin, starvation,
                                   starvation_ns, starvation_bypass, fairness_weight, fairness_cap_ns, work_weight});
           }),
           py::kw_only(), py::arg("laxity"), py::arg("budget_ns"), py::arg("priority_spacing_ns"), py::arg("demotion"),
           py::arg("late_margin"), py::arg("starvation"), py::arg("starvation_ns"), py::arg("starvation_bypass"),
           py::arg("fairness_weight"), py::arg("fairness_cap_ns"), py::arg("work_weight") = 0.0);

  PartClass<RoundRobin, sage::Route>(m, "RoundRobin", "Twin of sage_policies.route.RoundRobin.").def(py::init<>());
  PartClass<LeastInFlight, sage::Route>(m, "LeastInFlight", "Twin of sage_policies.route.LeastInFlight.")
      .def(py::init<>());
  PartClass<LeastOutstandingTokens, sage::Route>(m, "LeastOutstandingTokens",
                                                 "Twin of sage_policies.route.LeastOutstandingTokens.")
      .def(py::init<>());
  PartClass<PredictedFinish, sage::Route>(m, "PredictedFinish", "Twin of sage_policies.route.PredictedFinish.")
      .def(py::init<double>(), py::arg("share_penalty"));

  PartClass<EngineLimit, sage::Limit>(m, "EngineLimit", "Twin of sage_policies.limit.EngineLimit.")
      .def(py::init<std::optional<double>>(), py::arg("factor"));
  PartClass<Partition, sage::Limit>(m, "Partition", "Twin of sage_policies.limit.Partition.")
      .def(py::init<std::shared_ptr<sage::Limit>, std::vector<std::int64_t>, std::vector<std::int64_t>>(),
           py::arg("inner"), py::arg("llm_devices"), py::arg("embedding_devices"));
  PartClass<HybridLimit, sage::Limit>(m, "HybridLimit", "Twin of sage_policies.hybrid.HybridLimit.")
      .def(py::init([](bool in_flight_limits, double reserve, double prefill_depth, double kv_fill,
                       bool embedding_batches, std::int64_t batch_ns, std::int64_t window_ns, std::int64_t margin_ns,
                       std::int64_t starvation_ns, std::int64_t tpot_ns) {
             return std::make_shared<HybridLimit>(HybridLimitConfig{in_flight_limits, reserve, prefill_depth, kv_fill,
                                                                    embedding_batches, batch_ns, window_ns, margin_ns,
                                                                    starvation_ns, tpot_ns});
           }),
           py::kw_only(), py::arg("in_flight_limits"), py::arg("reserve"), py::arg("prefill_depth"), py::arg("kv_fill"),
           py::arg("embedding_batches"), py::arg("batch_ns"), py::arg("window_ns"), py::arg("margin_ns"),
           py::arg("starvation_ns"), py::arg("tpot_ns") = 0);

  m.def("order_scores", &order_scores, py::arg("order"), py::arg("now"), py::arg("mechanism"), py::arg("pool"),
        "(tasks, scores) of the whole queue of a pool, in no particular order.");
  m.def("route_scores", &route_scores, py::arg("route"), py::arg("now"), py::arg("mechanism"), py::arg("pool"),
        py::arg("task"), "(replicas,) scores of one queued task.");
  m.def("limits", &limits, py::arg("limit"), py::arg("now"), py::arg("mechanism"), py::arg("pool"),
        "The columns of sage_core.policy.Limits, in its order.");
}
