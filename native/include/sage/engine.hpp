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
// new KV block in an iteration depends only on its residue modulo the block size. What cannot be counted so (prompts in
// progress, whoever missed an iteration, speculative decoding) are members of an iteration in their own right.
//
// With asynchronous scheduling an iteration is decided when the one before it starts (Moment::ahead). Counted sequences
// that go on are in it without being named, so a jump decides all of its iterations but the first in closed form too.
//
// What will happen next if nobody interferes is found by letting a copy run ahead (Device::look_ahead). The copy costs
// the running batch only: it borrows the queues, and undoes what it did to the prefix cache.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "sage/id_map.hpp"
#include "sage/iteration.hpp"
#include "sage/kv_cache.hpp"

namespace sage {

using Ns = std::int64_t;

constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();  // the instant that does not come

constexpr std::int64_t kTokensMax = (std::int64_t{1} << 31) - 1;  // in or out of a task

// Names as in sage_sim.engine.LlmReplica, which explains them.
struct LlmConfig {
  IterationTime time;
  std::int64_t max_num_seqs, max_num_batched_tokens, block_size, kv_blocks;
  bool chunked_prefill, priority_queue, reserve_full_prompt, prefix_caching, async_scheduling;
  std::int64_t long_prefill_token_threshold, max_num_partial_prefills, watermark_blocks;
  std::int64_t longest_sequence;  // 0: no limit
  std::int64_t draft_tokens, draft_yield_ppm;
  Ns draft_ns, scheduler_ns, scheduler_seq_ns;
  Ns api_server_ns, api_server_token_ns, ingress_ns;
  Ns egress_ns, detokenizer_token_ns;
};

struct EmbedConfig {
  IterationTime time;
  std::int64_t max_batch_tasks, max_batch_tokens;
  bool padding;
  Ns ingress_ns, egress_ns;
};

// Tokens of a KV block. Divisions by a power of two are shifts: there are several per task.
class BlockSize {
 public:
  explicit BlockSize(std::int64_t tokens = 1)
      : tokens_(tokens),
        shift_((tokens & (tokens - 1)) == 0 ? std::countr_zero(static_cast<std::uint64_t>(tokens)) : -1) {}

  std::int64_t full(std::int64_t tokens) const { return shift_ >= 0 ? tokens >> shift_ : tokens / tokens_; }  // from 0
  std::int64_t blocks(std::int64_t tokens) const { return full(tokens + tokens_ - 1); }
  std::int64_t rest(std::int64_t tokens) const {  // from 0, also of a negative number
    if (shift_ >= 0) return tokens & (tokens_ - 1);
    const std::int64_t rest = tokens % tokens_;
    return rest < 0 ? rest + tokens_ : rest;
  }

 private:
  std::int64_t tokens_;
  int shift_;
};

// A task inside an engine.
struct Sequence {
  std::int64_t task = -1;
  std::int64_t priority = 0;  // 0 for all where the queue is FCFS
  std::int64_t arrival = 0;   // running number of the submission
  Ps visible_at = 0;
  std::int64_t input_tokens = 0;
  std::int64_t output_tokens = 0;
  std::int64_t generated = 0;  // output tokens; of a counted sequence, less Moment::decoded
  std::int64_t order = 0;      // place in the running order
  // Of a running sequence that is not counted; of a counted one they follow from `generated`.
  std::int64_t computed = 0;  // tokens in the KV cache when all iterations that are decided have ended
  std::int64_t blocks = 0;    // KV blocks held
  Ps last_token_at = 0;
  std::int32_t flying = 0;         // output tokens of iterations that are decided and have not ended
  std::int32_t verifications = 0;  // decodes so far, where they are speculative
  bool counted = false;            // decodes together with others: see Moment
  bool prompt_done = false;        // what comes next is a decode
  bool joins = false;              // is in the iteration decided ahead as a counted sequence
  bool prefilled = false;          // the keys and values of its prompt come with it
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
  std::size_t bucket_of(Ps gap);

  std::int64_t count_ = 0;
  Wide sum_ps_ = 0;
  std::vector<std::int64_t> counts_;
  std::size_t last_ = 0;  // bucket found last
};

// The largest iterations that have ended, as in sage_sim.engine_reference.Seen.
struct Seen {
  std::int64_t decode_seqs = 0, decode_kv_tokens = 0, prefill_tokens = 0, prompt_tokens = 0;

  void include(const Seen& other);
};

struct Stats {
  std::int64_t iterations = 0, preemptions = 0, batches = 0;
  std::int64_t prefix_queries = 0, prefix_hits = 0;
  std::int64_t embed_tokens = 0, embed_padded_tokens = 0;
  Ps llm_busy_ps = 0, prefill_busy_ps = 0, embed_busy_ps = 0;  // of work that has ended
  Seen seen, embed_seen;
  InterTokenLatency itl;
};

enum class Code : std::int64_t { kFirstToken = 0, kFinished = 1, kFailed = 2 };

struct Told {
  Ns at;
  Code code;
  std::int64_t task, value;
};

enum class Kind { kNothing, kIterations, kBatch };

// What one iteration or batch does.
struct Doing {
  IterationWork work;
  std::int64_t sequences = 0;      // of an iteration
  std::int64_t prompt_tokens = 0;  // as in Seen

  Seen seen() const { return {work.seqs, work.kv_tokens, work.prefill_tokens, prompt_tokens}; }
};

// What the device is doing: `count` LLM iterations one after another, or one embedding batch.
struct Work {
  Kind kind = Kind::kNothing;
  Ps start = 0, end = 0;
  Ps first = 0, growth = 0;  // duration of the first iteration, and how much longer each next one takes
  std::int64_t count = 0;
  Seen seen;                   // the size of the first
  std::int64_t kv_growth = 0;  // context tokens more in each next one

  Ps span(std::int64_t iterations) const;
  std::int64_t first_ending_at_or_after(Ps instant) const;  // 1 .. count
};

struct Finish {  // a counted sequence's last iteration, as a value of Moment::decoded
  std::int64_t at, order;
  std::int32_t slot;
};

// The part of a sequence that is not counted in an iteration.
struct Member {
  std::int32_t slot;  // from 0; below, ~slot is the place of a preempted sequence in Moment::orphans
  std::int64_t order;
  std::int64_t tokens, context;  // computed, on top of what
  std::int64_t outputs;          // tokens it generates
  bool decode;
};

// All of a device's state but its queues and its prefix cache: what a lookahead copies.
struct Moment {
  Ps free_at = 0;
  bool llm_ran_last = false;
  Work work;
  std::vector<Told> outbox;  // by instant, then in order of telling
  Ns last_told_at = 0;       // of the LLM engine

  std::vector<Sequence> slots;  // the running sequences; task -1: free
  std::vector<std::int32_t> slots_free;
  std::int64_t orders = 0;
  std::int64_t blocks_free = 0;  // those of all iterations that are decided taken off

  // Counted sequences: each decodes one token in every LLM iteration.
  std::vector<Finish> finishes;        // the soonest last
  std::vector<std::int64_t> residues;  // how many, by (computed - decoded) mod block_size
  std::int64_t decoded = 0;            // LLM iterations that have ended
  std::int64_t counted = 0;            // sequences
  std::int64_t counted_kv_tokens = 0;  // their context
  Ps last_iteration_end = 0;

  std::vector<std::int32_t> others;  // slots of the running sequences that are not counted, in running order
  std::vector<Member> members;       // of the iteration in progress; in running order
  std::vector<Sequence> orphans;     // preempted while it gives them a token
  std::vector<Member> ahead;         // of the iteration that is decided, if one is
  bool decided = false;
  std::optional<Doing> ahead_doing;  // where a cancellation since then has changed what the counters say

  std::vector<std::int64_t> batch;  // tasks of the embedding batch in progress
};

// A task's place in the queues.
struct Key {
  std::int64_t priority = 0, arrival = 0;
};

class Device {
 public:
  // `cache`: null without prefix caching. `stats`: null in a lookahead.
  Device(const std::optional<LlmConfig>& llm, const std::optional<EmbedConfig>& embed, KvCache* cache, Stats* stats);

  void run(Ps now);     // to the state at `now`; what could start at `now` has not
  void settle(Ps now);  // account for the part of a jump that is over; changes nothing that can be seen
  void submit_llm(const Sequence& seq);
  void submit_embed(const Sequence& seq);
  void remove(Ps now, std::int64_t task, const Key& key);
  void clear(Ps now);
  void tell(Ns at, Code code, std::int64_t task, std::int64_t value);
  Ns next_told(Device& scratch) const;  // instant of the next event if nothing else comes
  Ps next_start() const;                // of the next iteration or batch, when nothing is in progress
  std::int64_t running() const { return static_cast<std::int64_t>(m.slots.size() - m.slots_free.size()); }
  std::int64_t waiting() const { return static_cast<std::int64_t>(llm_waiting.size() + m.orphans.size()); }

  Moment m;
  SequenceQueue<ByArrival> llm_pending, embed_pending;  // submitted, not yet seen by the engine
  SequenceQueue<ByPriority> llm_waiting, embed_waiting;

 private:
  void look_ahead(const Device& from);
  bool next();
  bool tells_at_end() const;
  std::optional<Ns> end_of_steady_decoding() const;
  Ns told_at(const Work& work) const;
  void cut(Ps instant);

  void start(Ps begin);
  void start_batch(Ps begin);
  void start_iterations(Ps begin);
  bool decide(bool flying, std::vector<Member>& into);
  bool schedule_together(bool flying, std::vector<Member>& into, std::int64_t& budget);
  bool schedule_one_by_one(bool flying, std::vector<Member>& into, std::int64_t& budget);
  void admit(std::vector<Member>& into, std::int64_t budget);
  void schedule(Sequence& seq, std::int32_t slot, std::int64_t tokens, bool flying, std::vector<Member>& into,
                std::int64_t& budget);
  void unschedule(std::int32_t slot, bool flying, std::vector<Member>& into);
  std::int64_t chunk(std::int64_t rest) const;
  std::int64_t rest(const Sequence& seq) const;
  Doing doing(std::int64_t seqs, std::int64_t kv_tokens, const std::vector<Member>& members) const;
  Doing doing_ahead() const;
  Series series(const Doing& doing, std::int64_t terms_max) const;
  std::int64_t jump_length() const;

  void finish();
  void pass(std::int64_t iterations);
  void finish_iteration(Ns tell_at);
  void finish_counted(Ns tell_at);
  void finish_member(const Member& member, Ns tell_at);

  void preempt(std::int32_t slot, bool flying);
  void leave(std::int32_t slot, bool starts_over);
  std::int32_t take_slot(const Sequence& seq);
  void take(std::int64_t blocks);
  void count(std::int32_t slot);
  void uncount(std::int32_t slot, std::int64_t decided);
  void single_out(std::int32_t slot, bool flying);
  void drop_other(std::int32_t slot);
  static void drop_member(std::vector<Member>& members, std::int32_t slot);
  std::int64_t computed(const Sequence& counted) const;
  std::size_t residue(const Sequence& counted) const;
  std::size_t phase(std::int64_t round) const;
  std::int64_t blocks(std::int64_t tokens) const;
  std::int64_t blocks_taken_over(std::int64_t from, std::int64_t iterations) const;
  std::int64_t blocks_not_taken_by_finished(std::int64_t round) const;

  std::optional<LlmConfig> llm_;
  std::optional<EmbedConfig> embed_;
  bool host_time_ = false;  // iterations take CPU time that is not in the law
  Ns egress_min_ = 0;       // earliest that anything is told after it has happened
  BlockSize size_;
  KvCache* cache_;
  Stats* stats_;
};

class Engine {
 public:
  Engine(std::optional<LlmConfig> llm, std::optional<EmbedConfig> embed);

  void submit_llm(Ns now, std::int64_t task, std::int64_t input_tokens, std::int64_t output_tokens,
                  std::int64_t priority, std::vector<std::int64_t> contents = {}, bool prefilled = false);
  void submit_embed(Ns now, std::int64_t task, std::int64_t tokens);
  bool cancel(Ns now, std::int64_t task);
  void clear(Ns now);
  void run(Ns now);
  std::vector<Told> advance(Ns now);
  Ns wakeup_at();
  std::vector<std::int64_t> generated(const std::vector<std::int64_t>& tasks);
  Ns boundary_at();

  std::int64_t running() const { return device_.running(); }
  std::int64_t waiting() const;
  std::int64_t embed_running() const;
  std::int64_t embed_waiting() const;
  std::int64_t kv_blocks_free();
  const Stats& stats();
  Ns busy_ns(Kind kind) const;
  Ns prefill_busy_ns() const;

 private:
  Key enter(Ns now, std::int64_t task, std::int64_t priority);
  std::int64_t visible(const SequenceQueue<ByArrival>& pending) const;

  std::optional<LlmConfig> llm_;
  std::optional<EmbedConfig> embed_;
  std::unique_ptr<Stats> stats_;
  std::unique_ptr<KvCache> cache_;
  Device device_, ahead_;
  Ns now_ = 0;
  Ns tokenised_ = 0;  // when the API server is done with what it has
  std::int64_t arrivals_ = 0;
  IdMap<Key> known_;             // tasks whose end has not been told
  std::optional<Ns> wakeup_at_;  // empty: to be found again
};

}  // namespace sage
