// What the binding files share: policy parts from Python objects.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "sage/mechanism.hpp"

namespace sage {

std::shared_ptr<Order> order_of(const pybind11::object& part);
std::shared_ptr<Route> route_of(const pybind11::object& part);
std::shared_ptr<Limit> limit_of(const pybind11::object& part);

pybind11::object task_view(Mechanism& mechanism, std::size_t pool, const std::vector<std::int64_t>& tasks);
pybind11::object replica_view(Mechanism& mechanism, std::size_t pool);

}  // namespace sage
