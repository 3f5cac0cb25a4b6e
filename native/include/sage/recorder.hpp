// A run's steps folded into rows: one per request, dispatched task, replica report and step. The meaning is RunRecorder
// in sage_bench/results/recorder.py; what the columns hold is said in sage_bench/results/schema.py.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sage/columns.hpp"
#include "sage/loop.hpp"
#include "sage/words.hpp"

namespace sage {

// Becomes ConfigError: the user asked for what the rows cannot hold.
struct Unrecordable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Recorder final : public StepSink {
 public:
  struct Config {
    using Stages = std::vector<std::pair<std::string, std::string>>;  // (operator, pool)
    std::vector<std::pair<std::string, Stages>> pipelines;
    // The TPOT objective in ns of a kind and priority, if there is one; asked once for each.
    std::function<std::optional<double>(std::int64_t kind, std::int64_t priority)> tpot_max_ns;
    std::int64_t warmup_ns, cooldown_at;
    bool tasks, steps;                       // whether to keep these tables
    std::int64_t buffer_rows, buffer_bytes;  // what makes a table full; bytes: of encoded events
  };
  struct Replica {
    JoinedEvent joined;
    std::int64_t joined_ns;
    columns::Word pool, node;
    std::optional<std::int64_t> left_ns = std::nullopt;
    std::int64_t in_flight = 0;
  };
  enum Outcome : std::size_t { kResponded, kRejected, kCancelled, kFailed };
  static constexpr std::array<const char*, 4> kOutcomes{"responded", "rejected", "cancelled", "failed"};

  explicit Recorder(Config config);
  ~Recorder() override;

  // Throws InvariantViolation for what no correct plane can do, and Unrecordable.
  void step(std::int64_t now, const std::vector<Event>& events, const std::vector<Command>& commands,
            std::string_view encoded, const Digest& digest) override;
  bool full() const override;
  std::vector<std::string> full_tables() const;
  // The run is over, or was cut short: live requests have failed for `reason`, and their tasks have no end.
  void abort(const std::string& reason);

  std::vector<std::string> tables() const;
  // Throws std::out_of_range for a table that is not kept.
  columns::Table& table(const std::string& name);
  std::vector<std::int64_t> live() const;  // requests, in order of arrival
  std::int64_t arrived() const;
  std::int64_t tasks() const;
  const std::array<std::int64_t, 4>& outcomes() const;
  const std::vector<Replica>& replicas() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sage
