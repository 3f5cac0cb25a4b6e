// Native twins of sage_policies/predict.py.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "sage/plane.hpp"

namespace py = pybind11;

namespace sage {
namespace {

class NoPrediction : public Predict {
 public:
  std::int64_t predict(std::int64_t, Label, std::int64_t, std::int64_t, std::int64_t) override { return 0; }
  void observe(Label, std::int64_t, std::int64_t) override {}
};

class MaxPrediction : public Predict {
 public:
  std::int64_t predict(std::int64_t, Label, std::int64_t, std::int64_t, std::int64_t most) override { return most; }
  void observe(Label, std::int64_t, std::int64_t) override {}
};

class TenantQuantile : public Predict {
 public:
  TenantQuantile(double q, std::size_t window, std::int64_t prior, std::size_t samples_min)
      : q_(q), window_(window), prior_(prior), samples_min_(samples_min) {}

  std::int64_t predict(std::int64_t, Label tenant, std::int64_t kind, std::int64_t, std::int64_t most) override {
    const auto found = seen_.find({tenant, kind});
    if (found == seen_.end() || found->second.ranked.size() < samples_min_) return std::min(prior_, most);
    const auto& ranked = found->second.ranked;
    const auto rank = static_cast<std::size_t>(q_ * static_cast<double>(ranked.size()));
    return std::min(ranked[std::min(rank, ranked.size() - 1)], most);
  }

  void observe(Label tenant, std::int64_t kind, std::int64_t output_tokens) override {
    Window& seen = seen_[{tenant, kind}];
    auto& ranked = seen.ranked;
    if (seen.arrived.size() == window_) {
      ranked.erase(std::lower_bound(ranked.begin(), ranked.end(), seen.arrived.front()));
      seen.arrived.pop_front();
    }
    seen.arrived.push_back(output_tokens);
    ranked.insert(std::upper_bound(ranked.begin(), ranked.end(), output_tokens), output_tokens);
  }

 private:
  struct Window {
    std::deque<std::int64_t> arrived;  // oldest first
    std::vector<std::int64_t> ranked;  // the same lengths, ascending
  };
  double q_;
  std::size_t window_;
  std::int64_t prior_;
  std::size_t samples_min_;
  std::map<std::pair<Label, std::int64_t>, Window> seen_;
};

}  // namespace

void register_predict(py::module_& m) {
  py::class_<Predict, std::shared_ptr<Predict>>(m, "Predict", "A native predictor; see sage_core.policy.Predict.")
      .def("predict", [](Predict& self, std::int64_t request, std::string_view tenant, std::int64_t kind,
                         std::int64_t input_tokens,
                         std::int64_t most) { return self.predict(request, label(tenant), kind, input_tokens, most); })
      .def("observe", [](Predict& self, std::string_view tenant, std::int64_t kind, std::int64_t output_tokens) {
        self.observe(label(tenant), kind, output_tokens);
      });
  py::class_<NoPrediction, Predict, std::shared_ptr<NoPrediction>>(m, "NoPrediction").def(py::init<>());
  py::class_<MaxPrediction, Predict, std::shared_ptr<MaxPrediction>>(m, "MaxPrediction").def(py::init<>());
  py::class_<TenantQuantile, Predict, std::shared_ptr<TenantQuantile>>(m, "TenantQuantile")
      .def(py::init<double, std::size_t, std::int64_t, std::size_t>(), py::arg("q"), py::arg("window"),
           py::arg("prior"), py::arg("samples_min"));
}

}  // namespace sage
