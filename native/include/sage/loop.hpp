// The event loop of a simulated run between two instants at which somebody outside must look: messages on their way,
// devices, the plane, the log. Its meaning is sage_sim/loop_reference.py; equal configurations give equal digests.
//
// Order: by instant, then in order of scheduling; the plane's step comes after everything else at its instant, and what
// happens outside (SimPy's events) before it: `run` stops short of the instant it is given.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <queue>
#include <string>
#include <string_view>
#include <vector>

#include "sage/id_map.hpp"
#include "sage/log.hpp"
#include "sage/plane.hpp"
#include "sage/words.hpp"

namespace sage {

// What a prompt begins with: ids of its blocks of `block_tokens` tokens (sage_core.load.Contents). Shared, because what
// is shared by many prompts is kept once.
struct Contents {
  std::int64_t block_tokens = 0;
  std::vector<std::int64_t> blocks;
};

struct TruthOf {
  std::int64_t output_tokens = 0;
  std::shared_ptr<const Contents> contents;                  // null: shares nothing
  std::shared_ptr<const std::vector<std::int64_t>> results;  // by stage; null: a single stage, whose output it is

  std::int64_t result(std::int64_t stage) const {
    return results && stage >= 0 ? results->at(static_cast<std::size_t>(stage)) : output_tokens;
  }
};

// By live request. Only devices may ask: this is the oracle boundary.
using Truth = IdMap<TruthOf>;

// A simulated device: sage_sim.device.Device.
class LoopDevice {
 public:
  virtual ~LoopDevice() = default;
  // To `now`, then `command` (null: none); appends what the plane should know.
  virtual void step(std::int64_t now, const Command* command, const Truth& truth, std::vector<Event>& told) = 0;
  virtual std::int64_t wakeup_at() = 0;
  virtual void report(std::int64_t now, std::vector<Event>& reports) = 0;
};

// Told of every step.
class StepSink {
 public:
  virtual ~StepSink() = default;
  virtual void step(std::int64_t now, const std::vector<Event>& events, const std::vector<Command>& commands,
                    std::string_view encoded, const Digest& digest) = 0;
  virtual bool full() const { return false; }  // the loop returns so that somebody can empty it
};

// One direction of one link: first in, first out.
class Way {
 public:
  using Draw = std::function<std::vector<std::int64_t>()>;  // delays beyond the fixed one; the last is used first
  Way(std::int64_t delay, Draw draw) : delay_(delay), draw_(std::move(draw)) {}
  std::int64_t arrives_at(std::int64_t now);

 private:
  std::int64_t delay_, last_ = 0;
  Draw draw_;  // empty: no jitter
  std::vector<std::int64_t> drawn_;
};

struct Arrival {
  std::int64_t at;
  RequestArrived request;
  TruthOf truth;
};

enum class Why : std::int64_t {
  kReached = 0,  // nothing is left before the given instant
  kStarved = 1,  // the last known arrival has happened: feed more, or say that there are none
  kIdle = 2,     // every request has ended and no more will come
  kFull = 3,     // the sink wants to be emptied
  kBudget = 4,   // as many entries as allowed have been handled
};

class Loop {
 public:
  Loop(Plane& plane, StepSink* sink) : plane_(plane), sink_(sink) {}

  std::size_t add_slot(Way to_device, Way to_plane);
  void join(std::int64_t now, std::size_t slot, std::unique_ptr<LoopDevice> device,
            const std::vector<JoinedEvent>& joined);
  void drain(std::int64_t now, std::size_t slot);  // finish what is there, then leave
  void leave(std::int64_t now, std::size_t slot);  // at once, with all that is on it
  bool present(std::size_t slot) const { return slots_[slot].device != nullptr; }

  void feed(Arrival arrival) { arrivals_.push_back(std::move(arrival)); }
  void begin_arrivals();                                  // schedules the next one
  void end_arrivals() { loading_ = false; }               // no more will be fed
  void arrive(std::int64_t now, const Arrival& arrival);  // outside the order of `feed`
  void expect(std::int64_t more) { expected_ += more; }   // arrivals from outside that are on their way
  // Called with (now, request) whenever a request has ended.
  void on_ended(std::function<void(std::int64_t, std::int64_t)> call) { on_ended_ = std::move(call); }

  void scrape(std::int64_t now);  // every device reports
  Why run(std::int64_t until, std::int64_t budget);
  void stop_at(std::int64_t instant) { until_ = std::min(until_, instant); }  // from within a callback
  // A step of the plane outside the loop: the end of the run.
  void step(std::int64_t now, const std::vector<Event>& events);

  std::int64_t now() const { return now_; }
  std::int64_t next_at() const;
  std::int64_t steps() const { return steps_; }
  std::int64_t control_ns() const;
  const Digest& digest() const { return chain_.digest(); }
  const Truth& truth() const { return truth_; }
  bool idle() const { return truth_.empty() && !loading_ && expected_ == 0; }  // all requests ended, none to come
  bool deciding() const { return deciding_; }  // a step of the plane was left by an exception
  bool only_reports() const;                   // nothing but reports is on its way

 private:
  enum class Kind : std::uint32_t { kArrival, kCommand, kTold, kReport, kDeviceWakeup, kPlaneWakeup };
  struct Entry {
    std::int64_t at, sequence;
    Kind kind;
    std::uint32_t slot;
    std::int64_t life;
    std::int64_t payload;                       // index of a command or an event
    bool operator<(const Entry& other) const {  // for a heap whose top is the earliest
      return at != other.at ? at > other.at : sequence > other.sequence;
    }
  };
  struct Slot {
    Way to_device, to_plane;
    std::unique_ptr<LoopDevice> device;
    std::int64_t life = 0;
    bool draining = false;
    IdMap<bool> tasks;  // sent and not known to have ended
    std::int64_t armed_at = kNever;
    std::vector<std::int64_t> replicas;
  };
  template <class T>
  class Slab {
   public:
    std::int64_t put(T&& value) {
      if (free_.empty()) {
        all_.push_back(std::move(value));
        return static_cast<std::int64_t>(all_.size()) - 1;
      }
      const std::int64_t at = free_.back();
      free_.pop_back();
      all_[static_cast<std::size_t>(at)] = std::move(value);
      return at;
    }
    T take(std::int64_t at) {
      free_.push_back(at);
      return std::move(all_[static_cast<std::size_t>(at)]);
    }

   private:
    std::vector<T> all_;
    std::vector<std::int64_t> free_;
  };

  void at(std::int64_t when, Kind kind, std::size_t slot = 0, std::int64_t life = 0, std::int64_t payload = 0);
  void handle(const Entry& entry);
  void post(Event event);
  void pump();
  void decide_and_record(const std::vector<Event>& events);
  template <class C>
  void send(C&& command, std::int64_t replica);
  void ended(std::int64_t request);
  void arrived(const Arrival& arrival);
  void deliver(std::size_t slot, Command command);
  void step_device(std::size_t slot, const Command* command);
  void post_from(std::size_t slot, std::int64_t life, Event event);
  void leave_now(std::size_t slot);

  Plane& plane_;
  StepSink* sink_;
  std::priority_queue<Entry> queue_;
  std::int64_t sequence_ = 0;
  Slab<Command> commands_sent_;
  Slab<Event> events_sent_;
  std::vector<Slot> slots_;
  IdMap<std::size_t> slot_of_;  // by replica
  std::deque<Arrival> arrivals_;
  bool loading_ = true, starved_ = false;
  std::int64_t expected_ = 0;
  std::function<void(std::int64_t, std::int64_t)> on_ended_;
  Truth truth_;
  std::int64_t now_ = 0, until_ = 0;
  std::vector<Event> inbox_, stepping_, told_;
  std::vector<Command> commands_;
  std::string encoded_;
  bool pump_due_ = false, deciding_ = false;
  std::int64_t plane_wakeup_ = kNever;
  std::int64_t reports_due_ = 0;
  std::int64_t held_ = 0;  // wakeups since anything but a report happened
  Chain chain_;
  std::int64_t steps_ = 0, timed_steps_ = 0, timed_ns_ = 0;
};

}  // namespace sage
