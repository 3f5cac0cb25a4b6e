#include "sage/loop.hpp"

#include <algorithm>
#include <ctime>
#include <utility>

#include "sage/errors.hpp"

namespace sage {
namespace {

constexpr std::int64_t kHeldMax = 10'000;  // wakeups in a row that decide nothing
constexpr std::int64_t kTimedEvery = 64;   // the clock of the thread costs as much as a small step

std::int64_t thread_ns() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

bool is_report(const Event& event) { return std::holds_alternative<ReplicaReported>(event); }

}  // namespace

std::int64_t Way::arrives_at(std::int64_t now) {
  if (!draw_) return now + delay_;
  if (drawn_.empty()) drawn_ = draw_();
  last_ = std::max(last_, now + delay_ + drawn_.back());
  drawn_.pop_back();
  return last_;
}

// --- time ------------------------------------------------------------------------------------------------------------

Why Loop::run(std::int64_t until, std::int64_t budget) {
  until_ = until;
  for (; budget > 0; --budget) {
    const bool pump_next = pump_due_ && (queue_.empty() || queue_.top().at > now_);
    const std::int64_t next = pump_next ? now_ : queue_.empty() ? kNever : queue_.top().at;
    if (next >= until_ || next == kNever) return Why::kReached;
    if (pump_next) {
      pump();
    } else {
      const Entry entry = queue_.top();
      queue_.pop();
      now_ = entry.at;
      handle(entry);
    }
    if (starved_) return starved_ = false, Why::kStarved;
    if (idle()) return Why::kIdle;
    if (sink_ && sink_->full()) return Why::kFull;
  }
  return Why::kBudget;
}

std::int64_t Loop::next_at() const {
  if (pump_due_) return now_;
  return queue_.empty() ? kNever : queue_.top().at;
}

std::int64_t Loop::control_ns() const {
  if (timed_steps_ == 0) return 0;
  return static_cast<std::int64_t>(static_cast<double>(timed_ns_) / static_cast<double>(timed_steps_) *
                                   static_cast<double>(steps_));
}

bool Loop::only_reports() const { return !pump_due_ && static_cast<std::int64_t>(queue_.size()) == reports_due_; }

void Loop::at(std::int64_t when, Kind kind, std::size_t slot, std::int64_t life, std::int64_t payload) {
  queue_.push({when, sequence_++, kind, static_cast<std::uint32_t>(slot), life, payload});
}

void Loop::handle(const Entry& entry) {
  const std::size_t slot = entry.slot;
  switch (entry.kind) {
    case Kind::kArrival: {
      const Arrival arrival = std::move(arrivals_.front());
      arrivals_.pop_front();
      arrived(arrival);
      begin_arrivals();
      break;
    }
    case Kind::kCommand: {
      Command command = commands_sent_.take(entry.payload);
      if (slots_[slot].life == entry.life && slots_[slot].device) deliver(slot, std::move(command));
      break;
    }
    case Kind::kReport:
      --reports_due_;
      post_from(slot, entry.life, events_sent_.take(entry.payload));
      break;
    case Kind::kTold:
      post_from(slot, entry.life, events_sent_.take(entry.payload));
      break;
    case Kind::kDeviceWakeup: {
      Slot& at_slot = slots_[slot];
      if (at_slot.life == entry.life && at_slot.device && at_slot.armed_at == entry.at) {
        at_slot.armed_at = kNever;
        step_device(slot, nullptr);
      }
      break;
    }
    case Kind::kPlaneWakeup:
      if (entry.at == plane_wakeup_) {
        plane_wakeup_ = kNever;
        pump_due_ = true;
      }
      break;
  }
}

void Loop::post(Event event) {
  inbox_.push_back(std::move(event));
  pump_due_ = true;
}

void Loop::step(std::int64_t now, const std::vector<Event>& events) {
  now_ = now;
  decide_and_record(events);
}

void Loop::decide_and_record(const std::vector<Event>& events) {
  commands_.clear();
  const bool timed = steps_ % kTimedEvery == 0;
  const std::int64_t before = timed ? thread_ns() : 0;
  deciding_ = true;
  plane_.step(now_, events, commands_);
  deciding_ = false;
  if (timed) timed_ns_ += thread_ns() - before, ++timed_steps_;
  ++steps_;
  encoded_.clear();
  encode(events, encoded_);
  const Digest& digest = chain_.step(now_, encoded_, commands_);
  if (sink_) sink_->step(now_, events, commands_, encoded_, digest);
}

void Loop::pump() {
  pump_due_ = false;
  stepping_.clear();
  std::swap(stepping_, inbox_);
  decide_and_record(stepping_);
  for (Command& command : commands_) {
    if (auto* dispatch = std::get_if<Dispatch>(&command)) {
      send(std::move(*dispatch), dispatch->replica);
    } else if (auto* cancel = std::get_if<Cancel>(&command)) {
      send(std::move(*cancel), cancel->replica);
    } else if (const auto* respond = std::get_if<Respond>(&command)) {
      ended(respond->request);
    } else if (const auto* reject = std::get_if<Reject>(&command)) {
      ended(reject->request);
    } else {
      ended(std::get<Fail>(command).request);
    }
  }
  for (const Event& event : stepping_)
    if (const auto* cancelled = std::get_if<RequestCancelled>(&event)) ended(cancelled->request);
  if (!commands_.empty() || (!stepping_.empty() && !is_report(stepping_.front()))) {
    held_ = 0;
  } else if (stepping_.empty() && ++held_ > kHeldMax) {
    throw PolicyError("policy " + plane_.policy() +
                      ": its limit has put off the queued tasks 10,000 times in a row (hold_until) and nothing else "
                      "happens; a hold must end");
  }
  const std::int64_t wakeup = plane_.wakeup_at();
  if (wakeup < kNever && !(now_ < plane_wakeup_ && plane_wakeup_ <= wakeup)) {
    plane_wakeup_ = wakeup;
    at(wakeup, Kind::kPlaneWakeup);
  }
}

// --- load ------------------------------------------------------------------------------------------------------------

void Loop::begin_arrivals() {
  if (!arrivals_.empty())
    at(arrivals_.front().at, Kind::kArrival);
  else if (loading_)
    starved_ = true;
}

void Loop::arrive(std::int64_t now, const Arrival& arrival) {
  now_ = now;
  arrived(arrival);
}

void Loop::arrived(const Arrival& arrival) {
  truth_[arrival.request.request] = arrival.truth;
  post(arrival.request);
}

void Loop::ended(std::int64_t request) {
  // Where the request was cancelled after it had ended there is nothing to forget.
  if (truth_.erase(request) && on_ended_) on_ended_(now_, request);
}

// --- devices ---------------------------------------------------------------------------------------------------------

std::size_t Loop::add_slot(Way to_device, Way to_plane) {
  slots_.push_back({std::move(to_device), std::move(to_plane), nullptr, 0, false, {}, kNever, {}});
  return slots_.size() - 1;
}

void Loop::join(std::int64_t now, std::size_t index, std::unique_ptr<LoopDevice> device,
                const std::vector<JoinedEvent>& joined) {
  now_ = now;
  Slot& slot = slots_.at(index);
  slot.device = std::move(device);
  ++slot.life;
  slot.draining = false;
  slot.tasks.clear();
  slot.armed_at = kNever;
  slot.replicas.clear();
  for (const JoinedEvent& event : joined) {
    slot.replicas.push_back(event->replica);
    slot_of_[event->replica] = index;
    post(event);
  }
}

void Loop::drain(std::int64_t now, std::size_t index) {
  now_ = now;
  Slot& slot = slots_.at(index);
  slot.draining = true;
  for (const std::int64_t replica : slot.replicas) post(ReplicaDraining{replica});
  if (slot.tasks.empty()) leave_now(index);
}

void Loop::leave(std::int64_t now, std::size_t index) {
  now_ = now;
  leave_now(index);
}

void Loop::leave_now(std::size_t index) {
  Slot& slot = slots_.at(index);
  slot.device.reset();
  for (const std::int64_t replica : slot.replicas) {
    slot_of_.erase(replica);
    post(ReplicaLeft{replica});
  }
}

template <class C>
void Loop::send(C&& command, std::int64_t replica) {
  const std::size_t* found = slot_of_.find(replica);
  if (!found) return;  // the replica has left; the plane will hear of it
  const std::size_t index = *found;
  Slot& slot = slots_[index];
  if constexpr (std::is_same_v<std::decay_t<C>, Dispatch>) {
    for (const Task& task : command.tasks) slot.tasks.emplace(task.task, true);
  } else {
    slot.tasks.erase(command.task);
    if (slot.draining && slot.tasks.empty()) return leave_now(index);
  }
  at(slot.to_device.arrives_at(now_), Kind::kCommand, index, slot.life,
     commands_sent_.put(Command(std::forward<C>(command))));
}

void Loop::deliver(std::size_t slot, Command command) {
  if (auto* dispatch = std::get_if<Dispatch>(&command)) {
    // A request that ended while its task was on the way; the Cancel is right behind it.
    auto& tasks = dispatch->tasks;
    tasks.erase(std::remove_if(tasks.begin(), tasks.end(),
                               [this](const Task& task) { return !truth_.count(request_of(task.task)); }),
                tasks.end());
    if (tasks.empty()) return;
  }
  step_device(slot, &command);
}

void Loop::step_device(std::size_t index, const Command* command) {
  told_.clear();
  slots_[index].device->step(now_, command, truth_, told_);
  Slot& slot = slots_[index];
  for (Event& event : told_)
    at(slot.to_plane.arrives_at(now_), Kind::kTold, index, slot.life, events_sent_.put(std::move(event)));
  const std::int64_t wakeup = slot.device->wakeup_at();
  if (wakeup <= now_)
    throw IllegalEvent("device " + std::to_string(index) + " wants to wake at " + std::to_string(wakeup) +
                       ", not after " + std::to_string(now_));
  if (wakeup < kNever && wakeup != slot.armed_at) {
    slot.armed_at = wakeup;
    at(wakeup, Kind::kDeviceWakeup, index, slot.life);
  }
}

void Loop::post_from(std::size_t index, std::int64_t life, Event event) {
  Slot& slot = slots_[index];
  if (slot.life != life || !slot.device) return;  // what a dead device said last is lost with the connection
  std::int64_t over = -1;
  if (const auto* finished = std::get_if<TaskFinished>(&event)) over = finished->task;
  if (const auto* failed = std::get_if<TaskFailed>(&event)) over = failed->task;
  post(std::move(event));
  if (over >= 0) {
    slot.tasks.erase(over);
    if (slot.draining && slot.tasks.empty()) leave_now(index);
  }
}

void Loop::scrape(std::int64_t now) {
  now_ = now;
  for (std::size_t index = 0; index < slots_.size(); ++index) {
    if (!slots_[index].device) continue;
    told_.clear();
    slots_[index].device->report(now, told_);
    Slot& slot = slots_[index];
    for (Event& event : told_) {
      ++reports_due_;
      at(slot.to_plane.arrives_at(now), Kind::kReport, index, slot.life, events_sent_.put(std::move(event)));
    }
  }
}

}  // namespace sage
