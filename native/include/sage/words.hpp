// What is said across the edge of the control plane: events in, commands out. The twin of sage_core/events.py and
// sage_core/commands.py, which give the meaning of every field.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace sage {

inline constexpr int kTaskBits = 16;  // TaskId = request << kTaskBits | n

constexpr std::int64_t request_of(std::int64_t task) { return task >> kTaskBits; }

// A word out of a small vocabulary (tenants, pipelines): one address a word, kept until the process ends.
using Label = const std::string*;
Label label(std::string_view text);

struct RequestArrived {
  std::int64_t request;
  Label pipeline;
  std::int64_t kind;
  Label tenant;
  std::int64_t priority, input_tokens, output_tokens_max, scheduled_at, ttft_due_at, due_at, prefix;
};

struct RequestCancelled {
  std::int64_t request;
};

struct TokensProduced {
  std::int64_t task, count;
};

struct TaskFinished {
  std::int64_t task, output_tokens;
};

struct TaskFailed {
  std::int64_t task;
  std::string reason;
  bool retryable;
};

struct ReplicaReported {
  std::int64_t replica, running, waiting, kv_blocks_free;
};

struct ReplicaJoined {
  std::int64_t replica;
  std::string pool;
  std::int64_t pool_kind, device;
  std::string node;
  std::int64_t tasks_max, batch_tokens_max, kv_tokens_max;
  double fixed_ns, input_token_ns, output_token_ns, output_seq_ns;
};

struct ReplicaDraining {
  std::int64_t replica;
};

struct ReplicaLeft {
  std::int64_t replica;
};

struct PolicyChanged {
  std::string policy;
};

struct RunEnded {
  std::string reason;
};

// Rare and large, so held by reference: an event stays a few words long.
using JoinedEvent = std::shared_ptr<const ReplicaJoined>;

using Event = std::variant<RequestArrived, RequestCancelled, TokensProduced, TaskFinished, TaskFailed, ReplicaReported,
                           JoinedEvent, ReplicaDraining, ReplicaLeft, PolicyChanged, RunEnded>;

struct Task {
  std::int64_t task, stage, attempt, priority, queued_at, input_tokens, output_tokens_max, prefix;
};

struct Dispatch {
  std::int64_t replica;
  std::vector<Task> tasks;
};

struct Cancel {
  std::int64_t replica, task;
};

struct Respond {
  std::int64_t request;
};

struct Reject {
  std::int64_t request;
  std::string reason;
  std::int64_t retry_after_ns;
};

struct Fail {
  std::int64_t request;
  std::string reason;
};

using Command = std::variant<Dispatch, Cancel, Respond, Reject, Fail>;

}  // namespace sage
