// Python's view of the mechanism: the class, the table views handed to policies, and policies written in Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "sage/bind.hpp"
#include "sage/errors.hpp"
#include "sage/mechanism.hpp"

namespace py = pybind11;

namespace {

using sage::Limit;
using sage::LimitTable;
using sage::Mechanism;
using sage::Order;
using sage::Pool;
using sage::Route;

using Column = std::vector<std::int64_t>;
using RealColumn = std::vector<double>;

py::object python_error(const char* name) { return py::module_::import("sage_core.errors").attr(name); }

template <class T>
py::array frozen(py::array_t<T> array) {
  array.attr("flags").attr("writeable") = false;
  return array;
}

// Some rows of a pool's queue. Columns are copied when asked for, so what a policy keeps cannot change under it.
struct TaskView {
  std::shared_ptr<const Pool> pool;
  std::vector<std::size_t> rows;

  py::array column(const Column& from) const {
    py::array_t<std::int64_t> out(static_cast<py::ssize_t>(rows.size()));
    auto* to = out.mutable_data();
    for (std::size_t i = 0; i < rows.size(); ++i) to[i] = from.at(rows[i]);
    return frozen(out);
  }
  py::array tenant_service() const {
    py::array_t<std::int64_t> out(static_cast<py::ssize_t>(rows.size()));
    auto* to = out.mutable_data();
    for (std::size_t i = 0; i < rows.size(); ++i)
      to[i] = pool->tenant_service.at(static_cast<std::size_t>(pool->tasks.tenant.at(rows[i])));
    return frozen(out);
  }
};

struct ReplicaView {
  std::shared_ptr<const Pool> pool;

  template <class T>
  py::array column(const std::vector<T>& from) const {
    return frozen(py::array_t<T>(static_cast<py::ssize_t>(from.size()), from.data()));
  }
};

py::object speed_of(const Pool& pool) {
  static py::object* make = new py::object(py::module_::import("sage_core.policy").attr("Speed"));
  return (*make)(pool.speed.fixed_ns, pool.speed.input_token_ns, pool.speed.output_token_ns);
}

py::object pool_kind_of(const Pool& pool) {
  static py::object* make = new py::object(py::module_::import("sage_core.units").attr("PoolKind"));
  return (*make)(static_cast<std::int64_t>(pool.kind));
}

std::vector<std::size_t> range(std::size_t begin, std::size_t end) {
  std::vector<std::size_t> rows(end - begin);
  for (std::size_t i = begin; i < end; ++i) rows[i - begin] = i;
  return rows;
}

// Calls part.verb(now, views...) and copies the answer, checked as sage_core.reference.checked checks it.
py::array_t<double> scores(const py::object& part, const char* verb, const py::object& answer,
                           const std::vector<py::ssize_t>& shape) {
  py::object checked = py::module_::import("sage_core.reference").attr("checked");
  py::tuple want(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) want[i] = shape[i];
  py::object array = checked(answer, want, verb, part);
  return py::array_t<double, py::array::c_style | py::array::forcecast>(array);
}

std::string part_name(const py::object& part) {
  return py::cast<std::string>(py::module_::import("sage_core.reference").attr("part_name")(part));
}

class PythonOrder : public Order {
 public:
  explicit PythonOrder(py::object part) : part_(std::move(part)), static_(py::cast<bool>(part_.attr("static"))) {}
  bool is_static() const override { return static_; }
  void score(std::int64_t now, const Pool& pool, std::size_t begin, std::size_t end, double* out) override {
    py::object answer = part_.attr("score")(now, TaskView{pool.shared_from_this(), range(begin, end)});
    auto array = scores(part_, "order", answer, {static_cast<py::ssize_t>(end - begin)});
    std::memcpy(out, array.data(), (end - begin) * sizeof(double));
  }
  std::string name() const override { return part_name(part_); }

 private:
  py::object part_;
  bool static_;
};

class PythonRoute : public Route {
 public:
  explicit PythonRoute(py::object part)
      : part_(std::move(part)),
        live_(py::cast<bool>(part_.attr("live"))),
        load_weight_(py::cast<double>(part_.attr("load_weight"))) {}
  bool is_live() const override { return live_; }
  double load_weight() const override { return load_weight_; }
  void score(std::int64_t now, const Pool& pool, std::size_t row, double* out) override {
    auto matrix = score_matrix(now, pool, {row});
    std::memcpy(out, matrix.data(), matrix.size() * sizeof(double));
  }
  std::vector<double> score_matrix(std::int64_t now, const Pool& pool, const std::vector<std::size_t>& rows) override {
    py::object answer =
        part_.attr("score")(now, TaskView{pool.shared_from_this(), rows}, ReplicaView{pool.shared_from_this()});
    auto array = scores(part_, "route", answer,
                        {static_cast<py::ssize_t>(rows.size()), static_cast<py::ssize_t>(pool.serving.size())});
    return std::vector<double>(array.data(), array.data() + array.size());
  }
  std::string name() const override { return part_name(part_); }

 private:
  py::object part_;
  bool live_;
  double load_weight_;
};

class PythonLimit : public Limit {
 public:
  explicit PythonLimit(py::object part) : part_(std::move(part)) {}
  void limit(std::int64_t now, const Pool& pool, LimitTable& out) override {
    static py::object* make = new py::object(py::module_::import("sage_core.policy").attr("QueueView"));
    py::object queue = (*make)(pool_kind_of(pool), pool.tasks.size(), pool.input_tokens_queued, pool.oldest_queued_at(),
                               pool.earliest_due_at());
    py::object limits = part_.attr("limit")(now, ReplicaView{pool.shared_from_this()}, queue);
    copy(limits, "tasks_max", out.tasks_max);
    copy(limits, "tasks_max_batch", out.tasks_max_batch);
    copy(limits, "prefill_tokens_max", out.prefill_tokens_max);
    copy(limits, "kv_tokens_max", out.kv_tokens_max);
    copy(limits, "hold_until", out.hold_until);
  }
  std::string name() const override { return part_name(part_); }

 private:
  void copy(const py::object& limits, const char* column, Column& to) const {
    py::object checked = py::module_::import("sage_core.reference").attr("checked_limit");
    py::array_t<std::int64_t, py::array::c_style | py::array::forcecast> array =
        checked(limits, column, to.size(), part_);
    std::memcpy(to.data(), array.data(), to.size() * sizeof(std::int64_t));
  }
  py::object part_;
};

template <class Part, class Adapter>
std::shared_ptr<Part> part_of(const py::object& part) {
  if (py::isinstance<Part>(part)) return py::cast<std::shared_ptr<Part>>(part);
  return std::make_shared<Adapter>(part);
}

template <class View, class T>
auto task_column(T sage::TaskTable::* member) {
  return [member](const View& view) { return view.column(view.pool->tasks.*member); };
}

template <class T>
auto replica_column(std::vector<T> sage::ReplicaTable::* member) {
  return [member](const ReplicaView& view) { return view.column(view.pool->serving.*member); };
}

}  // namespace

namespace sage {

std::shared_ptr<Order> order_of(const py::object& part) { return part_of<Order, PythonOrder>(part); }
std::shared_ptr<Route> route_of(const py::object& part) { return part_of<Route, PythonRoute>(part); }
std::shared_ptr<Limit> limit_of(const py::object& part) { return part_of<Limit, PythonLimit>(part); }

py::object task_view(Mechanism& mechanism, std::size_t pool, const std::vector<std::int64_t>& tasks) {
  TaskView view{mechanism.pool(pool).shared_from_this(), {}};
  for (const std::int64_t task : tasks) view.rows.push_back(view.pool->row_of.at(task));
  return py::cast(std::move(view));
}

py::object replica_view(Mechanism& mechanism, std::size_t pool) {
  return py::cast(ReplicaView{mechanism.pool(pool).shared_from_this()});
}

}  // namespace sage

void register_mechanism(py::module_& m) {
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const sage::PolicyError& error) {
      py::set_error(python_error("PolicyError"), error.what());
    } catch (const sage::IllegalEvent& error) {
      py::set_error(python_error("IllegalEvent"), error.what());
    } catch (const sage::InvariantViolation& error) {
      py::set_error(python_error("InvariantViolation"), error.what());
    }
  });

  py::class_<Order, std::shared_ptr<Order>>(m, "Order", "A native order; see sage_core.policy.Order.");
  py::class_<Route, std::shared_ptr<Route>>(m, "Route", "A native route; see sage_core.policy.Route.");
  py::class_<Limit, std::shared_ptr<Limit>>(m, "Limit", "A native limit; see sage_core.policy.Limit.");

  using T = sage::TaskTable;
  py::class_<TaskView>(m, "TaskView", "Rows of a queue; see sage_core.policy.TaskView.")
      .def("__len__", [](const TaskView& view) { return view.rows.size(); })
      .def_property_readonly("pool", [](const TaskView& view) { return view.pool->name; })
      .def_property_readonly("pool_kind", [](const TaskView& view) { return pool_kind_of(*view.pool); })
      .def_property_readonly("speed", [](const TaskView& view) { return speed_of(*view.pool); })
      .def_property_readonly("oldest", [](const TaskView& view) { return view.pool->oldest(); })
      .def_property_readonly("bypassed", [](const TaskView& view) { return view.pool->bypassed; })
      .def_property_readonly("tenant_service", &TaskView::tenant_service)
      .def_property_readonly("task", task_column<TaskView>(&T::task))
      .def_property_readonly("request", task_column<TaskView>(&T::request))
      .def_property_readonly("kind", task_column<TaskView>(&T::kind))
      .def_property_readonly("tenant", task_column<TaskView>(&T::tenant))
      .def_property_readonly("priority", task_column<TaskView>(&T::priority))
      .def_property_readonly("attempt", task_column<TaskView>(&T::attempt))
      .def_property_readonly("arrived_at", task_column<TaskView>(&T::arrived_at))
      .def_property_readonly("queued_at", task_column<TaskView>(&T::queued_at))
      .def_property_readonly("ttft_due_at", task_column<TaskView>(&T::ttft_due_at))
      .def_property_readonly("due_at", task_column<TaskView>(&T::due_at))
      .def_property_readonly("input_tokens", task_column<TaskView>(&T::input_tokens))
      .def_property_readonly("output_tokens_max", task_column<TaskView>(&T::output_tokens_max))
      .def_property_readonly("output_tokens", task_column<TaskView>(&T::output_tokens))
      .def_property_readonly("prefix", task_column<TaskView>(&T::prefix));

  using R = sage::ReplicaTable;
  py::class_<ReplicaView>(m, "ReplicaView", "Serving replicas; see sage_core.policy.ReplicaView.")
      .def("__len__", [](const ReplicaView& view) { return view.pool->serving.size(); })
      .def_property_readonly("replica", replica_column(&R::replica))
      .def_property_readonly("device", replica_column(&R::device))
      .def_property_readonly("in_flight", replica_column(&R::in_flight))
      .def_property_readonly("device_in_flight", replica_column(&R::device_in_flight))
      .def_property_readonly("prefill_tokens", replica_column(&R::prefill_tokens))
      .def_property_readonly("kv_tokens", replica_column(&R::kv_tokens))
      .def_property_readonly("tasks_max", replica_column(&R::tasks_max))
      .def_property_readonly("batch_tokens_max", replica_column(&R::batch_tokens_max))
      .def_property_readonly("kv_tokens_max", replica_column(&R::kv_tokens_max))
      .def_property_readonly("running", replica_column(&R::running))
      .def_property_readonly("waiting", replica_column(&R::waiting))
      .def_property_readonly("kv_blocks_free", replica_column(&R::kv_blocks_free))
      .def_property_readonly("reported_at", replica_column(&R::reported_at))
      .def_property_readonly("last_dispatch", replica_column(&R::last_dispatch))
      .def_property_readonly("fixed_ns", replica_column(&R::fixed_ns))
      .def_property_readonly("input_token_ns", replica_column(&R::input_token_ns))
      .def_property_readonly("output_token_ns", replica_column(&R::output_token_ns))
      .def_property_readonly("output_seq_ns", replica_column(&R::output_seq_ns))
      .def_property_readonly("slowdown", replica_column(&R::slowdown));

  py::class_<Mechanism>(m, "Mechanism", "The scheduling mechanism; its meaning is sage_core.reference.Mechanism.")
      .def(py::init<>())
      .def("bind",
           [](Mechanism& self, std::int64_t now, const py::object& order, const py::object& route,
              const py::object& limit) {
             self.bind(now, sage::order_of(order), sage::route_of(route), sage::limit_of(limit));
           })
      .def("add_pool",
           [](Mechanism& self, std::string name, std::int64_t kind) {
             return self.add_pool(std::move(name), static_cast<sage::PoolKind>(kind));
           })
      .def("set_kind", [](Mechanism& self, std::size_t pool,
                          std::int64_t kind) { self.pool(pool).kind = static_cast<sage::PoolKind>(kind); })
      .def("join",
           [](Mechanism& self, std::size_t pool, std::int64_t replica, std::int64_t device, std::int64_t tasks_max,
              std::int64_t batch_tokens_max, std::int64_t kv_tokens_max, double fixed_ns, double input_token_ns,
              double output_token_ns, double output_seq_ns) {
             self.join(pool, {replica, device, tasks_max, batch_tokens_max, kv_tokens_max, fixed_ns, input_token_ns,
                              output_token_ns, output_seq_ns});
           })
      .def("drain", &Mechanism::drain)
      .def("leave", &Mechanism::leave)
      .def("report", &Mechanism::report)
      .def("enqueue",
           [](Mechanism& self, std::int64_t now, std::size_t pool, std::int64_t task, std::int64_t request,
              std::int64_t kind, std::int64_t tenant, std::int64_t priority, std::int64_t attempt,
              std::int64_t arrived_at, std::int64_t queued_at, std::int64_t ttft_due_at, std::int64_t due_at,
              std::int64_t input_tokens, std::int64_t output_tokens_max, std::int64_t output_tokens,
              std::int64_t prefix) {
             self.enqueue(now, pool,
                          {task, request, kind, tenant, priority, attempt, arrived_at, queued_at, ttft_due_at, due_at,
                           input_tokens, output_tokens_max, output_tokens, prefix});
           })
      .def("withdraw", &Mechanism::withdraw)
      .def("started", &Mechanism::started)
      .def("finished", &Mechanism::finished)
      .def("dropped", &Mechanism::dropped)
      .def("decide",
           [](Mechanism& self, std::int64_t now) {
             std::vector<sage::Decision> decisions = self.decide(now);
             py::list out(decisions.size());
             for (std::size_t i = 0; i < decisions.size(); ++i)
               out[i] = py::make_tuple(decisions[i].replica, decisions[i].task);
             return out;
           })
      .def_property_readonly("wakeup_at", &Mechanism::wakeup_at)
      .def("queued", &Mechanism::queued)
      .def("in_flight", &Mechanism::in_flight)
      .def("check", &Mechanism::check)
      .def("task_view", &sage::task_view)
      .def("replica_view", &sage::replica_view);
}
