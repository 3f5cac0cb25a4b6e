// Native twins of the baseline policies in policies/sage_policies; see policies.cpp for the rules kept.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sage/hashing.hpp"
#include "sage/mechanism.hpp"
#include "sage/plane.hpp"

namespace py = pybind11;

namespace {

using sage::kNever;
using sage::mix;
using sage::Pool;
using sage::PoolKind;
using sage::ReplicaTable;
using sage::TaskTable;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kClassSpanNs = 0x1p50;            // order.py CLASS_SPAN_NS
constexpr double kInstantNsMax = 0x1p50 - 0x1p30;  // order.py INSTANT_NS_MAX
constexpr double kNoDueNs = 0x1p52;                // order.py NO_DUE_NS
constexpr double kOverloaded = 0x1p52;             // affinity.py OVERLOADED
constexpr double kPeer = 1.5;                      // affinity.py PEER
constexpr double kMissedNs = 0x1p60;               // headroom.py MISSED_NS
constexpr double kLoadSpan = 0x1p26;               // upstream.py SPAN

double real(std::int64_t value) { return static_cast<double>(value); }

// --- orders ----------------------------------------------------------------------------------------------------------

class ShortestWork : public sage::Order {
 public:
  explicit ShortestWork(std::int64_t levels) : below_(real(levels - 1)) {}
  bool is_static() const override { return true; }
  std::string name() const override { return "ShortestWork"; }
  void score(std::int64_t, const Pool& pool, std::size_t begin, std::size_t end, double* out) override {
    const TaskTable& t = pool.tasks;
    for (std::size_t i = begin; i < end; ++i) {
      const double work =
          pool.speed.input_token_ns * real(t.input_tokens[i]) + pool.speed.output_token_ns * real(t.output_tokens[i]);
      out[i - begin] = work / (1.0 + std::max(below_ - real(t.priority[i]), 0.0));
    }
  }

 private:
  double below_;
};

class DeadlineGroups : public sage::Order {
 public:
  explicit DeadlineGroups(std::int64_t group_ns) : group_ns_(group_ns) {}
  bool is_static() const override { return true; }
  std::string name() const override { return "DeadlineGroups"; }
  void score(std::int64_t, const Pool& pool, std::size_t begin, std::size_t end, double* out) override {
    const TaskTable& t = pool.tasks;
    for (std::size_t i = begin; i < end; ++i) {
      const std::int64_t due = std::min(t.ttft_due_at[i], t.due_at[i]);
      const std::int64_t before = due % group_ns_ < 0 ? 1 : 0;  // rounded down, as Python divides
      const double group = real((due / group_ns_ - before) * group_ns_);
      out[i - begin] = due < kNever ? std::min(group, kNoDueNs - 1.0) : kNoDueNs;
    }
  }

 private:
  std::int64_t group_ns_;
};

class LeastServed : public sage::Order {
 public:
  explicit LeastServed(std::size_t depth) : depth_(depth) {}
  bool is_static() const override { return false; }
  std::string name() const override { return "LeastServed"; }
  void score(std::int64_t, const Pool& pool, std::size_t begin, std::size_t end, double* out) override {
    const TaskTable& t = pool.tasks;
    of_tenant_.resize(pool.tenant_service.size());
    for (auto& tasks : of_tenant_) tasks.clear();
    for (std::size_t i = begin; i < end; ++i)
      of_tenant_[static_cast<std::size_t>(t.tenant[i])].push_back({t.task[i], i});
    for (std::size_t tenant = 0; tenant < of_tenant_.size(); ++tenant) {
      auto& tasks = of_tenant_[tenant];
      const std::size_t counted = std::min(depth_, tasks.size());
      const auto cut = tasks.begin() + static_cast<std::ptrdiff_t>(counted);
      if (cut != tasks.end()) std::nth_element(tasks.begin(), cut, tasks.end());
      std::sort(tasks.begin(), cut);
      std::int64_t served = pool.tenant_service[tenant];
      for (std::size_t n = 0; n < tasks.size(); ++n) {
        const std::size_t i = tasks[n].second;
        out[i - begin] = real(served);
        if (n < counted) served += t.input_tokens[i] + 2 * t.output_tokens[i];
      }
    }
  }

 private:
  std::size_t depth_;
  std::vector<std::vector<std::pair<std::int64_t, std::size_t>>> of_tenant_;  // scratch: (task, row)
};

class UpstreamOrder : public sage::Order {
 public:
  bool is_static() const override { return true; }
  std::string name() const override { return "UpstreamOrder"; }
  void score(std::int64_t, const Pool& pool, std::size_t begin, std::size_t end, double* out) override {
    const TaskTable& t = pool.tasks;
    const bool embedding = pool.kind == PoolKind::kEmbedding;
    for (std::size_t i = begin; i < end; ++i) {
      const double arrived = real(t.arrived_at[i]);
      out[i - begin] = embedding ? arrived : real(t.priority[i]) * kClassSpanNs + std::min(arrived, kInstantNsMax);
    }
  }
};

// --- routes ----------------------------------------------------------------------------------------------------------

// wait.py expected_wait
double expected_wait(const ReplicaTable& s, std::size_t r) {
  const double slots = real(s.tasks_max[r]);
  const double prompts = s.input_token_ns[r] * real(s.prefill_tokens[r]);
  const double token_ns = (s.output_token_ns[r] + s.output_seq_ns[r] * slots) / slots;
  const double busy = prompts + token_ns * real(s.kv_tokens[r]);
  return busy * s.slowdown[r] + real(s.in_flight[r]);
}

class LeastExpectedWait : public sage::Route {
 public:
  std::string name() const override { return "LeastExpectedWait"; }
  void score(std::int64_t, const Pool& pool, std::size_t, double* out) override {
    for (std::size_t r = 0; r < pool.serving.size(); ++r) out[r] = expected_wait(pool.serving, r);
  }
};

class PowerOfTwo : public sage::Route {
 public:
  std::string name() const override { return "PowerOfTwo"; }
  void score(std::int64_t, const Pool& pool, std::size_t row, double* out) override {
    const std::size_t count = pool.serving.size();
    std::fill(out, out + count, kInf);
    if (count == 0) return;
    const std::uint64_t bits = mix(static_cast<std::uint64_t>(pool.tasks.task[row]));
    const std::size_t first = bits % count;
    const std::size_t second = (first + 1 + mix(bits) % std::max<std::size_t>(count - 1, 1)) % count;
    out[first] = expected_wait(pool.serving, first);
    out[second] = expected_wait(pool.serving, second);
  }
};

class PrefixAffinity : public sage::Route {
 public:
  explicit PrefixAffinity(double load_factor) : load_factor_(load_factor) {}
  std::string name() const override { return "PrefixAffinity"; }
  void score(std::int64_t, const Pool& pool, std::size_t row, double* out) override {
    const ReplicaTable& s = pool.serving;
    const std::size_t replicas = s.size();
    const std::int64_t prefix = pool.tasks.prefix[row];
    if (prefix == 0) {
      for (std::size_t r = 0; r < replicas; ++r) out[r] = real(s.in_flight[r]);
      return;
    }
    std::int64_t total = 0;
    for (std::size_t r = 0; r < replicas; ++r) total += s.in_flight[r];
    const double mean = (real(total) + 1.0) / std::max(static_cast<double>(replicas), 1.0);
    const double room = std::ceil(load_factor_ * mean);
    for (std::size_t r = 0; r < replicas; ++r) {
      out[r] = static_cast<double>(sage::draw(prefix, s.replica[r])) +
               (real(s.in_flight[r]) + 1.0 > room ? kOverloaded : 0.0);
    }
  }

 private:
  double load_factor_;
};

class PrefixHome : public sage::Route {
 public:
  PrefixHome(std::shared_ptr<sage::Route> inner, double load_factor, std::int64_t wait_ns)
      : inner_(std::move(inner)), load_factor_(load_factor), wait_ns_(wait_ns) {}
  std::string name() const override { return "PrefixHome"; }
  void score(std::int64_t now, const Pool& pool, std::size_t row, double* out) override {
    inner_->score(now, pool, row, out);
    const ReplicaTable& s = pool.serving;
    const std::size_t replicas = s.size();
    const TaskTable& t = pool.tasks;
    if (pool.kind != PoolKind::kLlm || t.prefix[row] == 0 || now - t.queued_at[row] > wait_ns_) return;
    const double input = real(t.input_tokens[row]), output = real(t.output_tokens[row]);
    alone_.resize(replicas);
    double fastest = kInf;
    for (std::size_t r = 0; r < replicas; ++r) {
      alone_[r] = s.fixed_ns[r] + s.input_token_ns[r] * input + s.output_token_ns[r] * output;
      fastest = std::min(fastest, alone_[r]);
    }
    const auto is_peer = [&](std::size_t r) { return alone_[r] <= kPeer * fastest; };
    std::size_t home = replicas;
    std::uint64_t lowest = std::numeric_limits<std::uint64_t>::max();
    double in_flight = 0.0, slots = 0.0;  // whole numbers
    for (std::size_t r = 0; r < replicas; ++r) {
      if (!is_peer(r)) continue;
      in_flight += real(s.in_flight[r]), slots += real(s.tasks_max[r]);
      const std::uint64_t drawn = sage::draw(t.prefix[row], s.replica[r]);
      if (drawn < lowest) lowest = drawn, home = r;
    }
    if (home == replicas) return;
    const double held = real(s.in_flight[home]), own_slots = real(s.tasks_max[home]);
    const double share = std::ceil(load_factor_ * (in_flight + 1.0) * own_slots / slots);
    if (!(held > 0.0 && held < own_slots && held + 1.0 <= share)) return;
    for (std::size_t r = 0; r < replicas; ++r)
      if (r != home && is_peer(r)) out[r] = kInf;
  }

 private:
  std::shared_ptr<sage::Route> inner_;
  double load_factor_;
  std::int64_t wait_ns_;
  std::vector<double> alone_;  // scratch
};

class Headroom : public sage::Route {
 public:
  explicit Headroom(bool pack) : pack_(pack) {}
  std::string name() const override { return "Headroom"; }
  void score(std::int64_t now, const Pool& pool, std::size_t row, double* out) override {
    const ReplicaTable& s = pool.serving;
    const TaskTable& t = pool.tasks;
    const double output = real(t.output_tokens[row]);
    const auto left_of = [now](std::int64_t due_at, double predicted_ns) {
      return due_at < kNever ? real(due_at - now) - predicted_ns : kInf;
    };
    for (std::size_t r = 0; r < s.size(); ++r) {
      const double prefill = s.fixed_ns[r] + s.input_token_ns[r] * real(s.prefill_tokens[r] + t.input_tokens[row]);
      const double token_ns = s.output_token_ns[r] + s.output_seq_ns[r] * real(s.in_flight[r] + 1);
      const double whole = (prefill + output * token_ns) * s.slowdown[r];
      const double left = std::min(left_of(t.ttft_due_at[row], prefill * s.slowdown[r]), left_of(t.due_at[row], whole));
      const double met = pack_ ? left : -left;
      out[r] = (left < 0.0 ? kMissedNs - left : left < kInf ? met : whole) + real(s.in_flight[r]);
    }
  }

 private:
  bool pack_;
};

// Not live: one answer for all tasks of a call.
class UpstreamRoute : public sage::Route {
 public:
  UpstreamRoute(std::vector<std::int64_t> shared_devices, bool counted)
      : shared_devices_(std::move(shared_devices)), counted_(counted) {
    std::sort(shared_devices_.begin(), shared_devices_.end());
  }
  bool is_live() const override { return false; }
  std::string name() const override { return "UpstreamRoute"; }
  void score(std::int64_t, const Pool& pool, std::size_t, double* out) override {
    const ReplicaTable& s = pool.serving;
    for (std::size_t r = 0; r < s.size(); ++r) {
      out[r] = real(counted_ ? s.in_flight[r] : s.running[r] + s.waiting[r]);
      if (pool.kind != PoolKind::kEmbedding) continue;
      const bool shared = std::binary_search(shared_devices_.begin(), shared_devices_.end(), s.device[r]);
      const double device = std::min(real(s.device_in_flight[r]), kLoadSpan - 1.0);
      out[r] = ((shared ? 1.0 : 0.0) * kLoadSpan + std::min(out[r], kLoadSpan - 1.0)) * kLoadSpan + device;
    }
  }
  std::vector<double> score_matrix(std::int64_t now, const Pool& pool, const std::vector<std::size_t>& rows) override {
    const std::size_t replicas = pool.serving.size();
    std::vector<double> matrix(rows.size() * replicas);
    for (std::size_t i = 0; i < rows.size(); ++i) score(now, pool, rows[i], matrix.data() + i * replicas);
    return matrix;
  }

 private:
  std::vector<std::int64_t> shared_devices_;
  bool counted_;
};

// --- admission -------------------------------------------------------------------------------------------------------

class ShedAtSaturation : public sage::Admit {
 public:
  ShedAtSaturation(std::int64_t power, double scale, std::int64_t waiting_max, double kv_fill,
                   std::int64_t retry_after_ns)
      : power_(power),
        scale_(scale),
        waiting_max_(real(waiting_max)),
        kv_fill_(kv_fill),
        retry_after_(retry_after_ns) {}
  std::string name() const override { return "ShedAtSaturation"; }
  std::int64_t retry_after_ns() const override { return retry_after_; }
  std::vector<double> score(std::int64_t, sage::Mechanism& mechanism, std::size_t index,
                            const std::vector<std::int64_t>& tasks) override {
    const Pool& pool = mechanism.pool(index);
    std::vector<double> scores(tasks.size(), 0.0);
    if (pool.serving.size() == 0) return scores;
    const double full = saturation(pool.serving);
    double chance = full;
    for (std::int64_t n = 1; n < power_; ++n) chance = chance * full;
    chance = chance * scale_;
    for (std::size_t i = 0; i < tasks.size(); ++i) {
      const std::size_t row = pool.row_of.at(tasks[i]);
      if (pool.tasks.priority[row] <= 0) continue;
      const std::uint64_t bits = mix(static_cast<std::uint64_t>(pool.tasks.request[row])) >> 11;
      if (static_cast<double>(bits) * 0x1p-53 < chance) scores[i] = kInf;
    }
    return scores;
  }

 private:
  double saturation(const ReplicaTable& s) const {
    double sum = 0.0;
    for (std::size_t r = 0; r < s.size(); ++r) {
      const double waiting = real(s.waiting[r]) / waiting_max_;
      const std::int64_t room = s.kv_tokens_max[r];
      const double kv = room > 0 ? real(s.kv_tokens[r]) / (kv_fill_ * real(room)) : 0.0;
      sum = sum + std::max(waiting, kv);
    }
    return sum / static_cast<double>(s.size());
  }

  std::int64_t power_;
  double scale_, waiting_max_, kv_fill_;
  std::int64_t retry_after_;
};

template <class T, class Base>
using PartClass = py::class_<T, Base, std::shared_ptr<T>>;

}  // namespace

namespace sage {

void register_baselines(py::module_& m) {
  PartClass<ShortestWork, Order>(m, "ShortestWork", "Twin of sage_policies.work.ShortestWork.")
      .def(py::init<std::int64_t>(), py::arg("levels"));
  PartClass<DeadlineGroups, Order>(m, "DeadlineGroups", "Twin of sage_policies.qlm.DeadlineGroups.")
      .def(py::init<std::int64_t>(), py::arg("group_ns"));
  PartClass<LeastServed, Order>(m, "LeastServed", "Twin of sage_policies.vtc.LeastServed.")
      .def(py::init<std::size_t>(), py::arg("depth"));
  PartClass<UpstreamOrder, Order>(m, "UpstreamOrder", "Twin of sage_policies.upstream.UpstreamOrder.")
      .def(py::init<>());
  PartClass<LeastExpectedWait, Route>(m, "LeastExpectedWait", "Twin of sage_policies.wait.LeastExpectedWait.")
      .def(py::init<>());
  PartClass<PowerOfTwo, Route>(m, "PowerOfTwo", "Twin of sage_policies.power_of_two.PowerOfTwo.").def(py::init<>());
  PartClass<PrefixAffinity, Route>(m, "PrefixAffinity", "Twin of sage_policies.affinity.PrefixAffinity.")
      .def(py::init<double>(), py::arg("load_factor"));
  PartClass<PrefixHome, Route>(m, "PrefixHome", "Twin of sage_policies.affinity.PrefixHome.")
      .def(py::init<std::shared_ptr<sage::Route>, double, std::int64_t>(), py::arg("inner"), py::arg("load_factor"),
           py::arg("wait_ns"));
  PartClass<Headroom, Route>(m, "Headroom", "Twin of sage_policies.headroom.Headroom.")
      .def(py::init<bool>(), py::arg("pack"));
  PartClass<UpstreamRoute, Route>(m, "UpstreamRoute", "Twin of sage_policies.upstream.UpstreamRoute.")
      .def(py::init<std::vector<std::int64_t>, bool>(), py::arg("shared_devices"), py::arg("counted"));
  py::class_<Admit, std::shared_ptr<Admit>>(m, "Admit", "A native admission; see sage_core.policy.Admit.");
  PartClass<ShedAtSaturation, Admit>(m, "ShedAtSaturation", "Twin of sage_policies.shedding.ShedAtSaturation.")
      .def(py::init<std::int64_t, double, std::int64_t, double, std::int64_t>(), py::arg("power"), py::arg("scale"),
           py::arg("waiting_max"), py::arg("kv_fill"), py::arg("retry_after_ns"))
      .def("score", &ShedAtSaturation::score, py::arg("now"), py::arg("mechanism"), py::arg("pool"), py::arg("tasks"));
}

}  // namespace sage
