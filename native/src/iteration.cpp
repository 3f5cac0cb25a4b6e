#include "sage/iteration.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <stdexcept>

namespace sage {
namespace {

constexpr std::int64_t kEndless = std::numeric_limits<std::int64_t>::max();

// a * b / c, rounded down, for b from 0 and c from 1; the division of 128 bits is slow and hardly ever needed.
std::int64_t scaled(std::int64_t a, std::int64_t b, std::int64_t c) {
  if (a < 0) return -narrow((static_cast<Wide>(-a) * b + c - 1) / c);
  std::int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) return narrow(static_cast<Wide>(a) * b / c);
  return product / c;
}

// The segment of rising `knots` (at least two) that x, from the first knot on, lies in; the last one has no end.
std::size_t segment(const Row& knots, std::int64_t x) {
  const auto above = std::upper_bound(knots.begin() + 1, knots.end() - 1, x);
  return static_cast<std::size_t>(above - knots.begin()) - 1;
}

const Row& row(const Numbers& numbers, const char* key) {
  const auto found = numbers.find(key);
  const Row* values = found == numbers.end() ? nullptr : std::get_if<Row>(&found->second);
  if (values == nullptr || values->empty()) throw std::invalid_argument(std::string("engine: expected a row ") + key);
  return *values;
}

}  // namespace

std::int64_t narrow(Wide value) {
  if (value > std::numeric_limits<std::int64_t>::max() - 1)
    throw std::overflow_error("simulated time passed 2^63 ps (106 days)");
  return static_cast<std::int64_t>(value);
}

std::int64_t number(const Numbers& numbers, const char* key, std::int64_t least) {
  const auto found = numbers.find(key);
  const std::int64_t* value = found == numbers.end() ? nullptr : std::get_if<std::int64_t>(&found->second);
  if (value == nullptr) throw std::invalid_argument(std::string("engine: missing ") + key);
  if (*value < least)
    throw std::invalid_argument(std::string("engine: ") + key + ": expected a whole number from " +
                                std::to_string(least) + ", got " + std::to_string(*value));
  return *value;
}

// sage_sim.iteration.IterationTime has checked the values; here only what would read past a row.
IterationTime::IterationTime(const Numbers& n)
    : tables_(std::make_shared<const Tables>(Tables{
          {row(n, "token_knots"), row(n, "token_ps")},
          {row(n, "head_knots"), row(n, "head_ps")},
          {row(n, "prefill_knots"), row(n, "prefill_ps")},
          {row(n, "attention_seqs"), row(n, "attention_context"), row(n, "decode_ps")},
          {row(n, "attention_seqs"), row(n, "attention_context"), row(n, "mixed_ps")},
          number(n, "mixed_token", 0),
          number(n, "prefill_pair", 0),
          number(n, "prefill_context", 0),
          number(n, "overhead", 0),
      })) {
  for (const Curve* curve : {&tables_->token, &tables_->head, &tables_->prefill})
    if (curve->knots.size() != curve->ps.size()) throw std::invalid_argument("engine: a curve needs a time per knot");
  for (const Table* table : {&tables_->decode, &tables_->mixed})
    if (table->seqs.size() * table->contexts.size() != table->ps.size())
      throw std::invalid_argument("engine: a table needs a time per pair of knots");
  if (tables_->token.ps.front() < 1) throw std::invalid_argument("engine: token_ps: expected at least 1 ps");
}

Ps IterationTime::iteration(const IterationWork& work) const {
  const Tables& t = *tables_;
  if (work.prefill_tokens == 0) return decode(work.seqs, work.kv_tokens, 1).first;
  const std::int64_t context = work.prefill_context / std::min<std::int64_t>(work.chunks, 2);
  Wide time = t.overhead + t.token.at(work.seqs + work.prefill_tokens) + t.head.at(work.seqs + work.chunks);
  time += prefill(work.prefill_tokens, work.attention2, context);
  time += t.mixed.attention(work.seqs, work.kv_tokens).first;
  time += static_cast<Wide>(t.mixed_token) * work.seqs * work.prefill_tokens / work.chunks;
  return narrow(time);
}

Series IterationTime::decode(std::int64_t seqs, std::int64_t kv_tokens, std::int64_t terms_max) const {
  const Tables& t = *tables_;
  Series series = t.decode.attention(seqs, kv_tokens);
  series.first = narrow(static_cast<Wide>(t.overhead) + t.token.at(seqs) + t.head.at(seqs) + series.first);
  series.terms = std::min(series.terms, terms_max);
  return series;
}

Ps IterationTime::batch(std::int64_t tokens, Wide attention2) const {
  const Tables& t = *tables_;
  return narrow(static_cast<Wide>(t.overhead) + t.token.at(tokens) + prefill(tokens, attention2, 0));
}

Ps IterationTime::prefill(std::int64_t tokens, Wide attention2, std::int64_t context) const {
  const Tables& t = *tables_;
  const Wide line = std::max<Wide>(t.prefill_pair * attention2 / 2, static_cast<Wide>(t.prefill_context) * context);
  return narrow(t.prefill.at(tokens) + line);
}

Ps IterationTime::Curve::at(std::int64_t x) const {
  if (knots.size() == 1 || x <= knots[0]) return ps[0];
  const std::size_t i = segment(knots, x);
  return ps[i] + scaled(ps[i + 1] - ps[i], x - knots[i], knots[i + 1] - knots[i]);
}

Series IterationTime::Table::attention(std::int64_t n, std::int64_t kv_tokens) const {
  if (n == 0) return {0, 0, kEndless};
  const std::size_t width = contexts.size();
  const bool one_row = seqs.size() == 1 || n <= seqs[0];
  const std::size_t below = one_row ? 0 : segment(seqs, n);
  const auto column = [&](std::size_t j) -> Ps {
    const Ps low = ps[below * width + j];
    if (one_row) return low;
    return low + scaled(ps[(below + 1) * width + j] - low, n - seqs[below], seqs[below + 1] - seqs[below]);
  };
  if (width == 1) return {column(0), 0, kEndless};
  if (kv_tokens < n * contexts[0]) return {column(0), 0, contexts[0] - kv_tokens / n};
  const std::size_t i = segment(contexts, kv_tokens / n);
  const Ps low = column(i), per_token = std::max<Ps>(0, column(i + 1) - low) / (contexts[i + 1] - contexts[i]);
  const Ps first = low + scaled(per_token, kv_tokens - n * contexts[i], n);
  return {first, per_token, i + 2 == width ? kEndless : contexts[i + 1] - kv_tokens / n};
}

namespace py = pybind11;

void register_iteration(py::module_& module) {
  py::class_<IterationTime>(module, "IterationTime",
                            "The law of iteration time that the engine uses; its meaning is sage_sim.iteration.")
      .def(py::init<const Numbers&>(), py::arg("numbers"))
      .def(
          "iteration_ps",
          [](const IterationTime& law, std::int64_t seqs, std::int64_t kv_tokens, std::int64_t chunks,
             std::int64_t prefill_tokens, std::int64_t prefill_context, std::int64_t attention2) {
            return law.iteration({seqs, kv_tokens, chunks, prefill_tokens, prefill_context, attention2});
          },
          py::arg("seqs"), py::arg("kv_tokens"), py::arg("chunks"), py::arg("prefill_tokens"),
          py::arg("prefill_context"), py::arg("attention2"))
      .def(
          "decode_series",
          [](const IterationTime& law, std::int64_t seqs, std::int64_t kv_tokens, std::int64_t terms_max) {
            const Series series = law.decode(seqs, kv_tokens, terms_max);
            return py::make_tuple(series.first, series.growth, series.terms);
          },
          py::arg("seqs"), py::arg("kv_tokens"), py::arg("terms_max"))
      .def(
          "batch_ps",
          [](const IterationTime& law, std::int64_t tokens, std::int64_t attention2) {
            return law.batch(tokens, attention2);
          },
          py::arg("tokens"), py::arg("attention2"));
}

}  // namespace sage
