// A simulated device with an LLM engine, an embedding engine, or both. The rules are in sage_sim/engine_reference.py,
// which walks; this one jumps.
//
// While the batch only decodes, its make-up is constant and its context grows by one token per sequence and iteration,
// so the durations of successive iterations are an arithmetic series: k iterations are one piece of work with a closed
// form. A jump ends at the first completion, where KV blocks run out, or at the iteration boundary at which something
// that has arrived may join. Any way of cutting a jump gives the same picoseconds, so a cut needs no proof of its own.
//
// Nothing is touched per sequence and iteration. Decoding sequences advance together, hence relative to one counter
// (Moment::decoded): when a sequence finishes is a constant, how long its context is follows, and whether it needs a
// new KV block in an iteration depends only on its residue modulo the block size.
//
// What will happen next if nobody interferes is found by letting a copy run ahead (Device::look_ahead). The copy costs
// the running batch only: it borrows the queues.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sage/iteration.hpp"

namespace sage {

using Ns = std::int64_t;

constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();  // the instant that does not come

constexpr std::int64_t kTokensMax = (std::int64_t{1} << 31) - 1;  // in or out of a task

struct LlmConfig {
  IterationTime time;
  std::int64_t max_num_seqs, max_num_batched_tokens, block_size, kv_blocks;
  bool chunked_prefill, priority_queue;
  Ns ingress_ns, egress_ns;
};

struct EmbedConfig {
  IterationTime time;
  std::int64_t max_batch_tasks, max_batch_tokens;
  bool padding;
  Ns ingress_ns, egress_ns;
};

// A task inside an engine.
struct Sequence {
  std::int64_t task = -1;
  std::int64_t priority = 0;  // 0 for all where the queue is FCFS
  std::int64_t arrival = 0;   // running number of the submission
  Ps visible_at = 0;
  std::int64_t input_tokens = 0;
  std::int64_t output_tokens = 0;
  std::int64_t generated = 0;  // output tokens; while decoding, less Moment::decoded
  std::int64_t computed = 0;   // tokens in the KV cache; while decoding it follows from `generated`
  std::int64_t order = 0;      // place in the running order
  Ps last_token_at = 0;        // while decoding it is Moment::last_iteration_end
  bool decoding = false;
};

struct ByArrival {
  bool operator()(const Sequence& a, const Sequence& b) const { return a.arrival < b.arrival; }
};

struct ByPriority {
  bool operator()(const Sequence& a, const Sequence& b) const {
    return a.priority != b.priority ? a.priority < b.priority : a.arrival < b.arrival;
  }
};

// Sequences in the order in which they will be taken. A borrower reads on in its lender's queue from the front, keeps
// what is pushed to it to itself, and leaves the lender as it was.
template <class Before>
class SequenceQueue {
 public:
  void borrow(const SequenceQueue& lender) {
    own_.clear();
    lender_ = &lender.own_;
    next_ = lender.own_.begin();
  }
  bool empty() const { return own_.empty() && !lends(); }
  const Sequence& front() const { return lent_first() ? *next_ : *own_.begin(); }
  void push(const Sequence& seq) { own_.insert(seq); }
  Sequence pop() {
    if (lent_first()) return *next_++;
    return own_.extract(own_.begin()).value();
  }
  bool erase(const Sequence& seq) { return own_.erase(seq) > 0; }
  void clear() { own_.clear(); }
  std::size_t size() const { return own_.size(); }
  const std::set<Sequence, Before>& own() const { return own_; }

 private:
  bool lends() const { return lender_ != nullptr && next_ != lender_->end(); }
  bool lent_first() const { return lends() && (own_.empty() || Before{}(*next_, *own_.begin())); }

  std::set<Sequence, Before> own_;
  const std::set<Sequence, Before>* lender_ = nullptr;
  typename std::set<Sequence, Before>::const_iterator next_;
};

// Gaps between successive tokens: exact sum, and counts in buckets 1 % wide.
class InterTokenLatency {
 public:
  InterTokenLatency();
  // `count` gaps each of `first`, `first + growth`, ... : `terms` terms.
  void add(Ps first, Ps growth, std::int64_t terms, std::int64_t count);

  std::int64_t count() const { return count_; }
  std::int64_t sum_ns() const { return static_cast<std::int64_t>(sum_ps_ / 1000); }
  std::vector<std::pair<Ns, std::int64_t>> samples() const;

 private:
  std::size_t bucket_of(Ps gap) const;

  std::int64_t count_ = 0;
  Wide sum_ps_ = 0;
  std::vector<std::int64_t> counts_;
};

struct Stats {
  std::int64_t iterations = 0, preemptions = 0, batches = 0;
  Ps llm_busy_ps = 0, embed_busy_ps = 0;  // of work that has ended
  InterTokenLatency itl;
};

enum class Code : std::int64_t { kFirstToken = 0, kFinished = 1, kFailed = 2 };

struct Told {
  Ns at;
  Code code;
  std::int64_t task, value;
};

enum class Kind { kNothing, kIterations, kBatch };

// What the device is doing: `count` LLM iterations one after another, or one embedding batch.
struct Work {
  Kind kind = Kind::kNothing;
  Ps start = 0, end = 0;
  Ps first = 0, growth = 0;  // duration of the first iteration, and how much longer each next one takes
  std::int64_t count = 0;

  Ps span(std::int64_t iterations) const;
  std::int64_t first_ending_at_or_after(Ps instant) const;  // 1 .. count
};

struct Finish {  // a decoding sequence's last iteration, as a value of Moment::decoded
  std::int64_t at, order;
  std::int32_t slot;
};

struct Chunk {
  std::int32_t slot;
  std::int64_t tokens;
};

// All of a device's state but its queues: what a lookahead copies.
struct Moment {
  Ps free_at = 0;
  bool llm_ran_last = false;
  Work work;
  std::vector<Told> outbox;  // by instant, then in order of telling

  std::vector<Sequence> slots;  // the running sequences; task -1: free
  std::vector<std::int32_t> slots_free;
  std::vector<Finish> finishes;         // of the decoding sequences, the soonest last
  std::vector<std::int64_t> residues;   // decoding sequences by (computed - decoded) mod block_size
  std::int64_t decoded = 0;             // LLM iterations that have ended
  std::int64_t decoding = 0;            // sequences
  std::int64_t decoding_kv_tokens = 0;  // their context
  std::int64_t blocks_free = 0;         // those of the iteration in progress taken off
  std::int64_t orders = 0;
  std::int32_t partial = -1;  // slot of the running sequence whose prompt is not yet complete
  Ps last_iteration_end = 0;
  std::vector<Chunk> chunks;        // prefills of the iteration in progress
  std::vector<std::int64_t> batch;  // tasks of the embedding batch in progress
};

// A task's place in the queues.
struct Key {
  std::int64_t priority, arrival;
};

class Device {
 public:
  Device(const std::optional<LlmConfig>& llm, const std::optional<EmbedConfig>& embed, Stats* stats);

  void run(Ps now);     // to the state at `now`; what could start at `now` has not
  void settle(Ps now);  // account for the part of a jump that is over; changes nothing that can be seen
  void submit_llm(const Sequence& seq);
  void submit_embed(const Sequence& seq);
  void remove(Ps now, std::int64_t task, const Key& key);
  void clear(Ps now);
  void tell(Ns at, Code code, std::int64_t task, std::int64_t value);
  Ns next_told(Device& scratch) const;  // instant of the next event if nothing else comes
  std::int64_t running() const { return static_cast<std::int64_t>(m.slots.size() - m.slots_free.size()); }

  Moment m;
  SequenceQueue<ByArrival> llm_pending, embed_pending;  // submitted, not yet seen by the engine
  SequenceQueue<ByPriority> llm_waiting, embed_waiting;

 private:
  void look_ahead(const Device& from);
  bool next();
  Ps next_start() const;
  bool tells_at_end() const;
  Ns egress_of(Kind kind) const;
  void cut(Ps instant);

  void start(Ps at);
  void start_batch(Ps at);
  void start_iterations(Ps at);
  bool schedule_running();
  void schedule_under_pressure();
  void admit();
  std::int64_t jump_length() const;

  void finish();
  void pass(std::int64_t iterations);
  void finish_decodes(Ns at);
  void finish_prefills(Ns at);

  void preempt(std::int32_t slot, std::int64_t blocks_held);
  std::int32_t take_slot(const Sequence& seq);
  void free_slot(std::int32_t slot);
  void join_decode(std::int32_t slot);
  void leave_decode(std::int32_t slot);
  std::int64_t computed(const Sequence& seq) const;
  std::size_t residue(const Sequence& seq) const;
  std::int64_t blocks(std::int64_t tokens) const;
  std::int64_t blocks_taken_over(std::int64_t from, std::int64_t iterations) const;

  std::optional<LlmConfig> llm_;
  std::optional<EmbedConfig> embed_;
  Ns egress_min_ = 0;
  Stats* stats_;  // null in a lookahead
};

class Engine {
 public:
  Engine(std::optional<LlmConfig> llm, std::optional<EmbedConfig> embed);

  void submit_llm(Ns now, std::int64_t task, std::int64_t input_tokens, std::int64_t output_tokens,
                  std::int64_t priority);
  void submit_embed(Ns now, std::int64_t task, std::int64_t tokens);
  bool cancel(Ns now, std::int64_t task);
  void clear(Ns now);
  void run(Ns now);
  std::vector<Told> advance(Ns now);
  Ns wakeup_at();

  std::int64_t running() const { return device_.running(); }
  std::int64_t waiting() const;
  std::int64_t embed_running() const;
  std::int64_t embed_waiting() const;
  std::int64_t kv_blocks_free();
  const Stats& stats();
  Ns busy_ns(Kind kind) const;

 private:
  Key enter(Ns now, std::int64_t task, std::int64_t priority);
  std::int64_t visible(const SequenceQueue<ByArrival>& pending) const;

  std::optional<LlmConfig> llm_;
  std::optional<EmbedConfig> embed_;
  std::unique_ptr<Stats> stats_;
  Device device_, ahead_;
  Ns now_ = 0;
  std::int64_t arrivals_ = 0;
  std::unordered_map<std::int64_t, Key> known_;  // tasks whose end has not been told
  std::optional<Ns> wakeup_at_;                  // empty: to be found again
};

}  // namespace sage
