#include "sage/engine.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

#include "sage/errors.hpp"

namespace sage {
namespace {

Ps to_ps(Ns now) { return now > kNone / 1000 ? kNone : now * 1000; }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }  // a, b >= 0

Ns told_at(Ps instant, Ns egress) { return ceil_div(instant, 1000) + egress; }

bool later_finish(const Finish& a, const Finish& b) { return a.at != b.at ? a.at > b.at : a.order > b.order; }

void check_tokens(std::int64_t task, std::int64_t count) {
  if (count < 1 || count > kTokensMax)
    throw IllegalEvent("task " + std::to_string(task) + ": expected token counts from 1 to " +
                       std::to_string(kTokensMax) + ", got " + std::to_string(count));
}

// Lower edges of the ITL buckets (ns); by integer arithmetic alone, as in the reference.
const std::vector<Ns>& itl_edges() {
  static const std::vector<Ns> edges = [] {
    std::vector<Ns> all{0};
    while (all.back() < 1'000'000'000'000'000'000) all.push_back(all.back() + std::max<Ns>(1, all.back() / 100));
    return all;
  }();
  return edges;
}

}  // namespace

// --- time ------------------------------------------------------------------------------------------------------------

Ps Work::span(std::int64_t iterations) const {
  const Wide n = iterations;
  return narrow(n * first + n * (n - 1) / 2 * growth);
}

std::int64_t Work::first_ending_at_or_after(Ps instant) const {
  std::int64_t low = 1, high = count;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (start + span(middle) >= instant)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

InterTokenLatency::InterTokenLatency() : counts_(itl_edges().size()) {}

void InterTokenLatency::add(Ps first, Ps growth, std::int64_t terms, std::int64_t count) {
  if (terms == 0 || count == 0) return;
  const Wide n = terms;
  count_ += terms * count;
  sum_ps_ += (n * first + n * (n - 1) / 2 * growth) * count;
  for (std::int64_t term = 0; term < terms;) {
    const Ps gap = first + growth * term;
    const std::size_t bucket = bucket_of(gap);
    std::int64_t same = terms - term;  // terms from here on in the same bucket
    if (growth > 0 && bucket + 1 < counts_.size()) {
      const Wide room = static_cast<Wide>(itl_edges()[bucket + 1]) * 1000 - gap;
      same = static_cast<std::int64_t>(std::min<Wide>(same, (room + growth - 1) / growth));
    }
    counts_[bucket] += same * count;
    term += same;
  }
}

std::size_t InterTokenLatency::bucket_of(Ps gap) const {
  const auto& edges = itl_edges();
  return static_cast<std::size_t>(std::upper_bound(edges.begin(), edges.end(), gap / 1000) - edges.begin()) - 1;
}

std::vector<std::pair<Ns, std::int64_t>> InterTokenLatency::samples() const {
  std::vector<std::pair<Ns, std::int64_t>> all;
  for (std::size_t bucket = 0; bucket < counts_.size(); ++bucket)
    if (counts_[bucket] > 0) all.emplace_back(itl_edges()[bucket], counts_[bucket]);
  return all;
}

// --- device: the loop ------------------------------------------------------------------------------------------------

Device::Device(const std::optional<LlmConfig>& llm, const std::optional<EmbedConfig>& embed, Stats* stats)
    : llm_(llm), embed_(embed), stats_(stats) {
  egress_min_ = std::min(llm ? llm->egress_ns : kNone, embed ? embed->egress_ns : kNone);
  if (llm) {
    m.blocks_free = llm->kv_blocks;
    m.residues.resize(static_cast<std::size_t>(llm->block_size));
  }
}

void Device::run(Ps now) {
  for (;;) {
    if (m.work.kind != Kind::kNothing) {
      if (m.work.end > now) return;
      finish();
    } else {
      const Ps at = next_start();
      if (at >= now) return;
      start(at);
    }
  }
}

bool Device::next() {
  if (m.work.kind != Kind::kNothing) {
    finish();
    return true;
  }
  const Ps at = next_start();
  if (at == kNone) return false;
  start(at);
  return true;
}

Ps Device::next_start() const {
  if (running() > 0 || !llm_waiting.empty() || !embed_waiting.empty()) return m.free_at;
  Ps visible = kNone;
  if (!llm_pending.empty()) visible = llm_pending.front().visible_at;
  if (!embed_pending.empty()) visible = std::min(visible, embed_pending.front().visible_at);
  return std::max(m.free_at, visible);
}

Ns Device::next_told(Device& scratch) const {
  const bool told = !m.outbox.empty();
  if (m.work.kind != Kind::kNothing && tells_at_end() && egress_of(m.work.kind) == egress_min_) {
    const Ns at = told_at(m.work.end, egress_min_);
    return told ? std::min(at, m.outbox.front().at) : at;
  }
  if (m.work.kind == Kind::kNothing && next_start() == kNone) return told ? m.outbox.front().at : kNone;
  scratch.look_ahead(*this);
  const Moment& ahead = scratch.m;
  for (;;) {
    const Ps clock = ahead.work.kind == Kind::kNothing ? ahead.free_at : ahead.work.end;
    if (!ahead.outbox.empty() && told_at(clock, egress_min_) >= ahead.outbox.front().at) break;
    if (!scratch.next()) break;
  }
  return ahead.outbox.empty() ? kNone : ahead.outbox.front().at;
}

void Device::look_ahead(const Device& from) {
  m = from.m;
  llm_pending.borrow(from.llm_pending), embed_pending.borrow(from.embed_pending);
  llm_waiting.borrow(from.llm_waiting), embed_waiting.borrow(from.embed_waiting);
}

bool Device::tells_at_end() const {
  if (m.work.kind == Kind::kBatch) return !m.batch.empty();
  if (!m.finishes.empty() && m.finishes.back().at == m.decoded + m.work.count) return true;
  return std::any_of(m.chunks.begin(), m.chunks.end(), [this](const Chunk& chunk) {
    const Sequence& seq = m.slots[static_cast<std::size_t>(chunk.slot)];
    const bool completes = seq.computed + chunk.tokens == seq.input_tokens + seq.generated;
    return completes && (seq.generated == 0 || seq.generated + 1 == seq.output_tokens);
  });
}

Ns Device::egress_of(Kind kind) const { return kind == Kind::kBatch ? embed_->egress_ns : llm_->egress_ns; }

void Device::tell(Ns at, Code code, std::int64_t task, std::int64_t value) {
  auto place = m.outbox.end();
  while (place != m.outbox.begin() && std::prev(place)->at > at) --place;
  m.outbox.insert(place, {at, code, task, value});
}

// --- device: commands ------------------------------------------------------------------------------------------------

void Device::submit_llm(const Sequence& seq) {
  llm_pending.push(seq);
  // Behind a first-come-first-served queue that waits, nothing it could join before the jump ends anyhow.
  if (llm_->priority_queue || llm_waiting.empty()) cut(seq.visible_at);
}

void Device::submit_embed(const Sequence& seq) {
  embed_pending.push(seq);
  cut(seq.visible_at);
}

void Device::remove(Ps now, std::int64_t task, const Key& key) {
  m.outbox.erase(std::remove_if(m.outbox.begin(), m.outbox.end(), [task](const Told& t) { return t.task == task; }),
                 m.outbox.end());
  m.batch.erase(std::remove(m.batch.begin(), m.batch.end(), task), m.batch.end());
  settle(now);
  // The iteration in progress takes as long as it would have; later ones do not, and the queue may have a new head.
  const bool iterating = m.work.kind == Kind::kIterations;
  if (iterating) cut(m.work.start);
  Sequence probe;
  probe.priority = key.priority, probe.arrival = key.arrival;
  if (llm_pending.erase(probe) || embed_pending.erase(probe) || llm_waiting.erase(probe) || embed_waiting.erase(probe))
    return;
  const auto found =
      std::find_if(m.slots.begin(), m.slots.end(), [task](const Sequence& seq) { return seq.task == task; });
  if (found == m.slots.end()) return;
  const auto slot = static_cast<std::int32_t>(found - m.slots.begin());
  std::int64_t tokens = computed(*found);
  if (found->decoding) {
    tokens += iterating;
    leave_decode(slot);
  } else {
    for (auto chunk = m.chunks.begin(); chunk != m.chunks.end(); ++chunk)
      if (chunk->slot == slot) {
        tokens += chunk->tokens;
        m.chunks.erase(chunk);
        break;
      }
    if (m.partial == slot) m.partial = -1;
  }
  m.blocks_free += blocks(tokens);
  free_slot(slot);
}

void Device::settle(Ps now) {
  Work& work = m.work;
  if (work.kind != Kind::kIterations || work.count == 1) return;
  const std::int64_t current = work.first_ending_at_or_after(now);
  if (work.start + work.span(current) == now) {  // what could start at `now` has not
    cut(now);
    finish();
  } else if (current > 1) {
    pass(current - 1);
  }
}

void Device::cut(Ps instant) {
  Work& work = m.work;
  if (work.kind != Kind::kIterations || work.count == 1 || work.end <= instant) return;
  work.count = work.first_ending_at_or_after(instant);
  work.end = work.start + work.span(work.count);
}

void Device::clear(Ps now) {
  if (m.work.kind == Kind::kIterations) {
    settle(now);
    if (m.work.kind == Kind::kIterations) stats_->llm_busy_ps += now - m.work.start;
  } else if (m.work.kind == Kind::kBatch) {
    stats_->embed_busy_ps += now - m.work.start;
  }
  const bool llm_ran_last = m.llm_ran_last;
  m = Moment{};
  m.free_at = now;
  m.llm_ran_last = llm_ran_last;
  if (llm_) {
    m.blocks_free = llm_->kv_blocks;
    m.residues.resize(static_cast<std::size_t>(llm_->block_size));
  }
  llm_pending.clear(), llm_waiting.clear(), embed_pending.clear(), embed_waiting.clear();
}

// --- device: starting work -------------------------------------------------------------------------------------------

void Device::start(Ps at) {
  while (!llm_pending.empty() && llm_pending.front().visible_at <= at) llm_waiting.push(llm_pending.pop());
  while (!embed_pending.empty() && embed_pending.front().visible_at <= at) embed_waiting.push(embed_pending.pop());
  const bool llm_has_work = running() > 0 || !llm_waiting.empty();
  if (!embed_waiting.empty() && (m.llm_ran_last || !llm_has_work))
    start_batch(at);
  else
    start_iterations(at);
}

void Device::start_batch(Ps at) {
  m.llm_ran_last = false;
  m.batch.clear();
  std::int64_t tokens = 0, longest = 0;
  Wide squares = 0;
  while (!embed_waiting.empty() && static_cast<std::int64_t>(m.batch.size()) < embed_->max_batch_tasks) {
    const std::int64_t size = embed_waiting.front().input_tokens;
    if (!m.batch.empty() && tokens + size > embed_->max_batch_tokens) break;
    m.batch.push_back(embed_waiting.pop().task);
    tokens += size, longest = std::max(longest, size), squares += static_cast<Wide>(size) * size;
  }
  if (embed_->padding) {
    const auto tasks = static_cast<std::int64_t>(m.batch.size());
    tokens = longest * tasks, squares = static_cast<Wide>(longest) * longest * tasks;
  }
  const Ps duration = embed_->time.batch(tokens, squares);
  m.work = {Kind::kBatch, at, narrow(static_cast<Wide>(at) + duration), duration, 0, 1};
}

void Device::start_iterations(Ps at) {
  if (running() == 0 && m.blocks_free != llm_->kv_blocks)
    throw InvariantViolation("invariant 9: nothing runs, but " + std::to_string(m.blocks_free) + " of " +
                             std::to_string(llm_->kv_blocks) + " KV blocks are free");
  m.llm_ran_last = true;
  m.chunks.clear();
  const bool preempted = schedule_running();
  if (!preempted) admit();

  Work work{Kind::kIterations, at, at, 0, 0, 1};
  if (m.chunks.empty()) {
    const std::int64_t most = preempted || !embed_waiting.empty() ? 1 : jump_length();
    const Series series = llm_->time.decode(m.decoding, m.decoding_kv_tokens, most);
    work.first = series.first, work.growth = series.growth, work.count = series.terms;
  } else {
    IterationWork doing{m.decoding, m.decoding_kv_tokens};
    for (const Chunk& chunk : m.chunks) {
      const Sequence& seq = m.slots[static_cast<std::size_t>(chunk.slot)];
      ++doing.chunks, doing.prefill_tokens += chunk.tokens, doing.prefill_context += seq.computed;
      doing.attention2 += static_cast<Wide>(chunk.tokens) * (2 * seq.computed + chunk.tokens);
    }
    work.first = llm_->time.iteration(doing);
  }
  work.end = narrow(static_cast<Wide>(at) + work.span(work.count));
  m.work = work;
  if (work.count > 1) {
    if (!llm_pending.empty() && (llm_->priority_queue || llm_waiting.empty())) cut(llm_pending.front().visible_at);
    if (!embed_pending.empty()) cut(embed_pending.front().visible_at);
  }
}

// Takes blocks for one iteration of everything that runs. True if that took a preemption.
bool Device::schedule_running() {
  const auto phase = static_cast<std::size_t>((llm_->block_size - m.decoded % llm_->block_size) % llm_->block_size);
  std::int64_t need = m.residues[phase], tokens = 0;
  if (m.partial >= 0) {
    const Sequence& seq = m.slots[static_cast<std::size_t>(m.partial)];
    tokens = std::min(seq.input_tokens + seq.generated - seq.computed, llm_->max_num_batched_tokens - m.decoding);
    need += blocks(seq.computed + tokens) - blocks(seq.computed);
  }
  if (need > m.blocks_free) {
    schedule_under_pressure();
    return true;
  }
  m.blocks_free -= need;
  if (m.partial >= 0) m.chunks.push_back({m.partial, tokens});
  return false;
}

// The same one sequence at a time, in running order, for when blocks do not suffice.
void Device::schedule_under_pressure() {
  struct Member {
    std::int32_t slot;
    bool running;
    std::int64_t blocks_held, tokens;
  };
  std::vector<Member> members;
  for (std::size_t i = 0; i < m.slots.size(); ++i)
    if (m.slots[i].task >= 0) members.push_back({static_cast<std::int32_t>(i), true, blocks(computed(m.slots[i])), 0});
  auto seq_of = [this](const Member& member) -> Sequence& { return m.slots[static_cast<std::size_t>(member.slot)]; };
  std::sort(members.begin(), members.end(),
            [&](const Member& a, const Member& b) { return seq_of(a).order < seq_of(b).order; });
  auto victim = [&]() -> Member& {
    Member* last = nullptr;
    for (Member& member : members)
      if (member.running && (last == nullptr || !llm_->priority_queue || ByPriority{}(seq_of(*last), seq_of(member))))
        last = &member;
    return *last;
  };

  std::int64_t budget = llm_->max_num_batched_tokens;
  for (Member& member : members) {
    if (!member.running) continue;
    const Sequence& seq = seq_of(member);
    const std::int64_t done = computed(seq);
    const std::int64_t tokens = seq.decoding ? 1 : std::min(seq.input_tokens + seq.generated - done, budget);
    const std::int64_t need = blocks(done + tokens) - member.blocks_held;
    while (member.running && need > m.blocks_free) {
      Member& out = victim();
      budget += out.tokens;
      out.running = false;
      preempt(out.slot, out.blocks_held);
    }
    if (!member.running) continue;
    m.blocks_free -= need, member.blocks_held += need;
    budget -= tokens, member.tokens = tokens;
    if (!seq.decoding) m.chunks.push_back({member.slot, tokens});
  }
}

void Device::admit() {
  std::int64_t budget = llm_->max_num_batched_tokens - m.decoding;
  for (const Chunk& chunk : m.chunks) budget -= chunk.tokens;
  while (budget > 0 && !llm_waiting.empty() && running() < llm_->max_num_seqs) {
    const Sequence& head = llm_waiting.front();
    std::int64_t tokens = head.input_tokens + head.generated;
    if (llm_->chunked_prefill)
      tokens = std::min(tokens, budget);
    else if (tokens > budget && !m.chunks.empty())
      return;
    if (blocks(tokens) > m.blocks_free) return;
    m.blocks_free -= blocks(tokens), budget -= tokens;
    m.chunks.push_back({take_slot(llm_waiting.pop()), tokens});
  }
}

// Iterations until the first completion, or until blocks run out; those of the first iteration are already taken.
std::int64_t Device::jump_length() const {
  const std::int64_t most = m.finishes.back().at - m.decoded;
  if (m.decoding * ceil_div(most - 1, llm_->block_size) <= m.blocks_free) return most;
  std::int64_t low = 1, high = most;
  while (low < high) {
    const std::int64_t middle = high - (high - low) / 2;
    if (blocks_taken_over(m.decoded + 1, middle - 1) <= m.blocks_free)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// --- device: ending work ---------------------------------------------------------------------------------------------

void Device::finish() {
  const Ps end = m.work.end;
  const Ns at = told_at(end, egress_of(m.work.kind));
  if (m.work.kind == Kind::kBatch) {
    if (stats_) ++stats_->batches, stats_->embed_busy_ps += end - m.work.start;
    for (const std::int64_t task : m.batch) tell(at, Code::kFinished, task, 0);
    m.batch.clear();
  } else {
    pass(m.work.count);
    finish_decodes(at);
    finish_prefills(at);
  }
  m.work.kind = Kind::kNothing;
  m.free_at = end;
}

// Accounts for the next `iterations` of the work in progress; they are over.
void Device::pass(std::int64_t iterations) {
  Work& work = m.work;
  const Ps span = work.span(iterations);
  if (stats_) {
    stats_->iterations += iterations, stats_->llm_busy_ps += span;
    const Ps before = work.start - m.last_iteration_end;  // an embedding batch in between
    stats_->itl.add(work.first + before, 0, 1, m.decoding);
    stats_->itl.add(work.first + work.growth, work.growth, iterations - 1, m.decoding);
  }
  m.blocks_free -= blocks_taken_over(m.decoded + 1, std::min(iterations, work.count - 1));
  if (m.blocks_free < 0) throw InvariantViolation("invariant 9: a jump took more KV blocks than were free");
  m.decoded += iterations;
  m.decoding_kv_tokens += m.decoding * iterations;
  work.start += span, work.first += work.growth * iterations, work.count -= iterations;
  m.last_iteration_end = work.start;
}

void Device::finish_decodes(Ns at) {
  while (!m.finishes.empty() && m.finishes.back().at == m.decoded) {
    const std::int32_t slot = m.finishes.back().slot;
    const Sequence& seq = m.slots[static_cast<std::size_t>(slot)];
    tell(at, Code::kFinished, seq.task, seq.output_tokens);
    m.blocks_free += blocks(computed(seq));
    leave_decode(slot);
    free_slot(slot);
  }
}

void Device::finish_prefills(Ns at) {
  for (const Chunk& chunk : m.chunks) {
    Sequence& seq = m.slots[static_cast<std::size_t>(chunk.slot)];
    seq.computed += chunk.tokens;
    if (seq.computed < seq.input_tokens + seq.generated) {
      m.partial = chunk.slot;
      continue;
    }
    if (m.partial == chunk.slot) m.partial = -1;
    if (++seq.generated == 1)
      tell(at, Code::kFirstToken, seq.task, 1);
    else if (stats_)
      stats_->itl.add(m.last_iteration_end - seq.last_token_at, 0, 1, 1);
    if (seq.generated == seq.output_tokens) {
      tell(at, Code::kFinished, seq.task, seq.output_tokens);
      m.blocks_free += blocks(seq.computed);
      free_slot(chunk.slot);
    } else {
      join_decode(chunk.slot);
    }
  }
  m.chunks.clear();
}

// --- device: sequences -----------------------------------------------------------------------------------------------

void Device::preempt(std::int32_t slot, std::int64_t blocks_held) {
  if (stats_) ++stats_->preemptions;
  Sequence& seq = m.slots[static_cast<std::size_t>(slot)];
  if (seq.decoding) {
    leave_decode(slot);
    seq.last_token_at = m.last_iteration_end;
  }
  if (m.partial == slot) m.partial = -1;
  m.blocks_free += blocks_held;
  seq.computed = 0;
  llm_waiting.push(seq);
  free_slot(slot);
}

std::int32_t Device::take_slot(const Sequence& seq) {
  std::int32_t slot = static_cast<std::int32_t>(m.slots.size());
  if (m.slots_free.empty()) {
    m.slots.push_back(seq);
  } else {
    slot = m.slots_free.back();
    m.slots_free.pop_back();
    m.slots[static_cast<std::size_t>(slot)] = seq;
  }
  m.slots[static_cast<std::size_t>(slot)].order = m.orders++;
  return slot;
}

void Device::free_slot(std::int32_t slot) {
  m.slots[static_cast<std::size_t>(slot)].task = -1;
  m.slots_free.push_back(slot);
}

void Device::join_decode(std::int32_t slot) {
  Sequence& seq = m.slots[static_cast<std::size_t>(slot)];
  ++m.decoding;
  m.decoding_kv_tokens += seq.computed;
  seq.decoding = true;
  seq.generated -= m.decoded;
  ++m.residues[residue(seq)];
  const Finish finish{seq.output_tokens - seq.generated, seq.order, slot};
  m.finishes.insert(std::lower_bound(m.finishes.begin(), m.finishes.end(), finish, later_finish), finish);
}

void Device::leave_decode(std::int32_t slot) {
  Sequence& seq = m.slots[static_cast<std::size_t>(slot)];
  const Finish finish{seq.output_tokens - seq.generated, seq.order, slot};
  m.finishes.erase(std::lower_bound(m.finishes.begin(), m.finishes.end(), finish, later_finish));
  --m.residues[residue(seq)];
  seq.computed = computed(seq);
  seq.generated += m.decoded;
  seq.decoding = false;
  m.decoding_kv_tokens -= seq.computed;
  --m.decoding;
}

std::int64_t Device::computed(const Sequence& seq) const {
  return seq.decoding ? seq.input_tokens + seq.generated + m.decoded - 1 : seq.computed;
}

std::size_t Device::residue(const Sequence& seq) const {
  const std::int64_t size = llm_->block_size;
  return static_cast<std::size_t>(((seq.input_tokens + seq.generated - 1) % size + size) % size);
}

std::int64_t Device::blocks(std::int64_t tokens) const { return ceil_div(tokens, llm_->block_size); }

// Blocks that the decoding sequences take in iterations `from`, `from + 1`, ... (as values of Moment::decoded).
std::int64_t Device::blocks_taken_over(std::int64_t from, std::int64_t iterations) const {
  if (iterations == 0) return 0;
  const std::int64_t size = llm_->block_size;
  std::int64_t taken = iterations / size * m.decoding;
  for (std::int64_t at = from; at < from + iterations % size; ++at)
    taken += m.residues[static_cast<std::size_t>((size - at % size) % size)];
  return taken;
}

// --- engine ----------------------------------------------------------------------------------------------------------

Engine::Engine(std::optional<LlmConfig> llm, std::optional<EmbedConfig> embed)
    : llm_(llm),
      embed_(embed),
      stats_(std::make_unique<Stats>()),
      device_(llm, embed, stats_.get()),
      ahead_(llm, embed, nullptr) {}

void Engine::submit_llm(Ns now, std::int64_t task, std::int64_t input_tokens, std::int64_t output_tokens,
                        std::int64_t priority) {
  if (!llm_) throw IllegalEvent("this device has no LLM engine");
  check_tokens(task, input_tokens);
  check_tokens(task, output_tokens);
  const Key key = enter(now, task, llm_->priority_queue ? priority : 0);
  const std::int64_t needed = ceil_div(input_tokens + output_tokens - 1, llm_->block_size);
  if (needed > llm_->kv_blocks) return device_.tell(now, Code::kFailed, task, needed);
  Sequence seq;
  seq.task = task, seq.priority = key.priority, seq.arrival = key.arrival;
  seq.visible_at = narrow((static_cast<Wide>(now) + llm_->ingress_ns) * 1000);
  seq.input_tokens = input_tokens, seq.output_tokens = output_tokens;
  device_.submit_llm(seq);
}

void Engine::submit_embed(Ns now, std::int64_t task, std::int64_t tokens) {
  if (!embed_) throw IllegalEvent("this device has no embedding engine");
  check_tokens(task, tokens);
  const Key key = enter(now, task, 0);
  Sequence seq;
  seq.task = task, seq.arrival = key.arrival;
  seq.visible_at = narrow((static_cast<Wide>(now) + embed_->ingress_ns) * 1000);
  seq.input_tokens = tokens;
  device_.submit_embed(seq);
}

bool Engine::cancel(Ns now, std::int64_t task) {
  run(now);
  const auto found = known_.find(task);
  if (found == known_.end()) return false;
  device_.remove(to_ps(now), task, found->second);
  known_.erase(found);
  wakeup_at_.reset();
  return true;
}

void Engine::clear(Ns now) {
  run(now);
  device_.clear(to_ps(now));
  known_.clear();
  wakeup_at_.reset();
}

std::vector<Told> Engine::advance(Ns now) {
  run(now);
  auto& outbox = device_.m.outbox;
  const auto rest = std::find_if(outbox.begin(), outbox.end(), [now](const Told& t) { return t.at > now; });
  std::vector<Told> told(outbox.begin(), rest);
  outbox.erase(outbox.begin(), rest);
  for (const Told& t : told)
    if (t.code != Code::kFirstToken) known_.erase(t.task);
  if (!told.empty()) wakeup_at_.reset();
  return told;
}

Ns Engine::wakeup_at() {
  if (!wakeup_at_) wakeup_at_ = device_.next_told(ahead_);
  return *wakeup_at_;
}

void Engine::run(Ns now) {
  if (now < now_) throw IllegalEvent("time went back: " + std::to_string(now) + " after " + std::to_string(now_));
  now_ = now;
  device_.run(to_ps(now));
}

Key Engine::enter(Ns now, std::int64_t task, std::int64_t priority) {
  run(now);
  const Key key{priority, arrivals_ + 1};
  if (!known_.emplace(task, key).second) throw IllegalEvent("task " + std::to_string(task) + " was submitted twice");
  ++arrivals_;
  wakeup_at_.reset();
  return key;
}

std::int64_t Engine::waiting() const {
  return static_cast<std::int64_t>(device_.llm_waiting.size()) + visible(device_.llm_pending);
}

std::int64_t Engine::embed_running() const {
  return device_.m.work.kind == Kind::kBatch ? static_cast<std::int64_t>(device_.m.batch.size()) : 0;
}

std::int64_t Engine::embed_waiting() const {
  return static_cast<std::int64_t>(device_.embed_waiting.size()) + visible(device_.embed_pending);
}

std::int64_t Engine::visible(const SequenceQueue<ByArrival>& pending) const {
  std::int64_t n = 0;
  for (const Sequence& seq : pending.own()) {
    if (seq.visible_at > to_ps(now_)) break;
    ++n;
  }
  return n;
}

std::int64_t Engine::kv_blocks_free() {
  device_.settle(to_ps(now_));
  return device_.m.blocks_free;
}

const Stats& Engine::stats() {
  device_.settle(to_ps(now_));
  return *stats_;
}

Ns Engine::busy_ns(Kind kind) const {
  const Work& work = device_.m.work;
  const Ps ended = kind == Kind::kBatch ? stats_->embed_busy_ps : stats_->llm_busy_ps;
  return (ended + (work.kind == kind ? to_ps(now_) - work.start : 0)) / 1000;
}

// --- binding ---------------------------------------------------------------------------------------------------------

namespace py = pybind11;

namespace {

using Numbers = std::map<std::string, std::int64_t>;

std::int64_t number(const Numbers& numbers, const char* key, std::int64_t least) {
  const auto found = numbers.find(key);
  if (found == numbers.end()) throw std::invalid_argument(std::string("engine: missing ") + key);
  if (found->second < least)
    throw std::invalid_argument(std::string("engine: ") + key + ": expected a whole number from " +
                                std::to_string(least) + ", got " + std::to_string(found->second));
  return found->second;
}

IterationTime iteration_time(const Numbers& n) {
  return {number(n, "decode_base", 1),   number(n, "decode_seq", 0),     number(n, "decode_kv", 0),
          number(n, "prefill_floor", 0), number(n, "prefill_base", 0),   number(n, "prefill_token", 0),
          number(n, "prefill_attn", 0),  number(n, "mixed_permille", 0), number(n, "overhead", 0)};
}

LlmConfig llm_config(const Numbers& n) {
  LlmConfig config{iteration_time(n),
                   number(n, "max_num_seqs", 1),
                   number(n, "max_num_batched_tokens", 1),
                   number(n, "block_size", 1),
                   number(n, "kv_blocks", 1),
                   number(n, "chunked_prefill", 0) != 0,
                   number(n, "priority_queue", 0) != 0,
                   number(n, "ingress_ns", 0),
                   number(n, "egress_ns", 0)};
  // Every decoding sequence advances in every iteration; the counters above rest on it.
  if (config.max_num_batched_tokens < config.max_num_seqs)
    throw std::invalid_argument("engine: max_num_batched_tokens: expected at least max_num_seqs");
  return config;
}

EmbedConfig embed_config(const Numbers& n) {
  return {iteration_time(n),
          number(n, "max_batch_tasks", 1),
          number(n, "max_batch_tokens", 1),
          number(n, "padding", 0) != 0,
          number(n, "ingress_ns", 0),
          number(n, "egress_ns", 0)};
}

}  // namespace

void register_engine(py::module_& module) {
  py::class_<Engine>(module, "Engine",
                     "A device's engines in virtual time; sage_sim.engine_reference says what it does.")
      .def(py::init([](const std::optional<Numbers>& llm, const std::optional<Numbers>& embed) {
             if (!llm && !embed)
               throw std::invalid_argument("engine: expected an LLM engine, an embedding engine, or both");
             return std::make_unique<Engine>(llm ? std::optional(llm_config(*llm)) : std::nullopt,
                                             embed ? std::optional(embed_config(*embed)) : std::nullopt);
           }),
           py::arg("llm"), py::arg("embed"))
      .def("submit_llm", &Engine::submit_llm, py::arg("now"), py::arg("task"), py::arg("input_tokens"),
           py::arg("output_tokens"), py::arg("priority"))
      .def("submit_embed", &Engine::submit_embed, py::arg("now"), py::arg("task"), py::arg("tokens"))
      .def("cancel", &Engine::cancel, py::arg("now"), py::arg("task"))
      .def("clear", &Engine::clear, py::arg("now"))
      .def(
          "advance",
          [](Engine& engine, Ns now) {
            py::list told;
            for (const Told& t : engine.advance(now))
              told.append(py::make_tuple(static_cast<std::int64_t>(t.code), t.task, t.value));
            return told;
          },
          py::arg("now"))
      .def("run", &Engine::run, py::arg("now"))
      .def_property_readonly("wakeup_at", &Engine::wakeup_at)
      .def_property_readonly("running", &Engine::running)
      .def_property_readonly("waiting", &Engine::waiting)
      .def_property_readonly("kv_blocks_free", &Engine::kv_blocks_free)
      .def_property_readonly("iterations", [](Engine& engine) { return engine.stats().iterations; })
      .def_property_readonly("preemptions", [](Engine& engine) { return engine.stats().preemptions; })
      .def_property_readonly("busy_ns", [](const Engine& engine) { return engine.busy_ns(Kind::kIterations); })
      .def_property_readonly("itl_count", [](Engine& engine) { return engine.stats().itl.count(); })
      .def_property_readonly("itl_sum_ns", [](Engine& engine) { return engine.stats().itl.sum_ns(); })
      .def("itl_samples",
           [](Engine& engine) {
             py::dict samples;
             for (const auto& [edge, count] : engine.stats().itl.samples()) samples[py::int_(edge)] = count;
             return samples;
           })
      .def_property_readonly("embed_running", &Engine::embed_running)
      .def_property_readonly("embed_waiting", &Engine::embed_waiting)
      .def_property_readonly("embed_batches", [](Engine& engine) { return engine.stats().batches; })
      .def_property_readonly("embed_busy_ns", [](const Engine& engine) { return engine.busy_ns(Kind::kBatch); });
}

}  // namespace sage
