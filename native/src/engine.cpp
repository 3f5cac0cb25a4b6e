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

std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }

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

// Looks where the last one was first: successive gaps hardly differ.
std::size_t InterTokenLatency::bucket_of(Ps gap) {
  const auto& edges = itl_edges();
  const Ns ns = gap / 1000;
  if (edges[last_] > ns || last_ + 1 == edges.size() || edges[last_ + 1] <= ns)
    last_ = static_cast<std::size_t>(std::upper_bound(edges.begin(), edges.end(), ns) - edges.begin()) - 1;
  return last_;
}

std::vector<std::pair<Ns, std::int64_t>> InterTokenLatency::samples() const {
  std::vector<std::pair<Ns, std::int64_t>> all;
  for (std::size_t bucket = 0; bucket < counts_.size(); ++bucket)
    if (counts_[bucket] > 0) all.emplace_back(itl_edges()[bucket], counts_[bucket]);
  return all;
}

void Seen::include(const Seen& other) {
  decode_seqs = std::max(decode_seqs, other.decode_seqs);
  decode_kv_tokens = std::max(decode_kv_tokens, other.decode_kv_tokens);
  prefill_tokens = std::max(prefill_tokens, other.prefill_tokens);
  prompt_tokens = std::max(prompt_tokens, other.prompt_tokens);
}

// --- device: the loop ------------------------------------------------------------------------------------------------

Device::Device(const std::optional<LlmConfig>& llm, const std::optional<EmbedConfig>& embed, KvCache* cache,
               Stats* stats)
    : llm_(llm), embed_(embed), cache_(cache), stats_(stats) {
  egress_min_ = std::min(llm ? llm->egress_ns + llm->detokenizer_token_ns : kNone, embed ? embed->egress_ns : kNone);
  if (llm) {
    m.blocks_free = llm->kv_blocks;
    m.residues.resize(static_cast<std::size_t>(llm->block_size));
    size_ = BlockSize(llm->block_size);
    host_time_ = llm->scheduler_ns > 0 || llm->scheduler_seq_ns > 0 || llm->draft_ns > 0;
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
  if (m.work.kind != Kind::kNothing && tells_at_end()) {
    const Ns ends = told_at(m.work);
    const bool first = !llm_ || !embed_ || ends == ceil_div(m.work.end, 1000) + egress_min_;  // of what is to come
    if (first) return told ? std::min(ends, m.outbox.front().at) : ends;
  }
  if (m.work.kind == Kind::kNothing && next_start() == kNone) return told ? m.outbox.front().at : kNone;
  if (const std::optional<Ns> ends = end_of_steady_decoding())
    return told ? std::min(*ends, m.outbox.front().at) : *ends;
  scratch.look_ahead(*this);
  struct Undo {
    KvCache* cache;
    ~Undo() {
      if (cache) cache->roll_back();
    }
  } undo{cache_};
  const Moment& ahead = scratch.m;
  for (;;) {
    const Ps clock = ahead.work.kind == Kind::kNothing ? ahead.free_at : ahead.work.end;
    if (!ahead.outbox.empty() && ceil_div(clock, 1000) + egress_min_ >= ahead.outbox.front().at) break;
    if (!scratch.next()) break;
  }
  return ahead.outbox.empty() ? kNone : ahead.outbox.front().at;
}

// Where nobody waits and blocks suffice, those that decode go on until the first of them has its last token: when that
// is told. Most lookaheads would find no more than this.
std::optional<Ns> Device::end_of_steady_decoding() const {
  const bool in_progress = m.work.kind != Kind::kNothing;
  if (embed_ || m.counted == 0 || !llm_pending.empty() || !llm_waiting.empty()) return std::nullopt;
  if (!m.others.empty() || !m.members.empty() || !m.ahead.empty() || m.ahead_doing) return std::nullopt;
  const std::int64_t begun = in_progress ? m.work.count : 0;
  std::int64_t left = m.finishes.back().at - m.decoded - begun;
  if (m.counted * (blocks(left + begun) + 1) > m.blocks_free) return std::nullopt;
  Work work = m.work;
  work.end = in_progress ? m.work.end : m.free_at;
  std::int64_t kv_tokens = m.counted_kv_tokens + m.counted * begun;
  while (left > 0) {
    const Series times = series(doing(m.counted, kv_tokens, m.members), left);
    work.first = times.first, work.growth = times.growth;
    work.end = narrow(static_cast<Wide>(work.end) + work.span(times.terms));
    kv_tokens += m.counted * times.terms, left -= times.terms;
  }
  work.kind = Kind::kIterations;
  return told_at(work);
}

void Device::look_ahead(const Device& from) {
  m = from.m;
  llm_pending.borrow(from.llm_pending), embed_pending.borrow(from.embed_pending);
  llm_waiting.borrow(from.llm_waiting), embed_waiting.borrow(from.embed_waiting);
  if (cache_) cache_->mark();
}

bool Device::tells_at_end() const {
  if (m.work.kind == Kind::kBatch) return !m.batch.empty();
  if (!m.finishes.empty() && m.finishes.back().at == m.decoded + m.work.count) return true;
  return std::any_of(m.members.begin(), m.members.end(), [this](const Member& member) {
    const Sequence& seq = member.slot < 0 ? m.orphans[at(~member.slot)] : m.slots[at(member.slot)];
    return member.outputs > 0 && (seq.generated == 0 || seq.generated + member.outputs == seq.output_tokens);
  });
}

// When what the work brings is told.
Ns Device::told_at(const Work& work) const {
  const Ns end = ceil_div(work.end, 1000);
  if (work.kind == Kind::kBatch) return end + embed_->egress_ns;
  std::int64_t outputs = m.counted;
  for (const Member& member : m.members) outputs += member.outputs;
  return std::max(m.last_told_at, end + llm_->egress_ns + llm_->detokenizer_token_ns * outputs);
}

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
  // What is decided takes as long as it would have; later iterations do not, and the queue may have a new head.
  const bool iterating = m.work.kind == Kind::kIterations;
  if (m.decided && !m.ahead_doing) m.ahead_doing = doing_ahead();
  if (iterating) cut(m.work.start);
  Sequence probe;
  probe.priority = key.priority, probe.arrival = key.arrival;
  if (embed_pending.erase(probe) || embed_waiting.erase(probe)) return;
  const auto is_it = [task](const Sequence& seq) { return seq.task == task; };
  const auto orphan = std::find_if(m.orphans.begin(), m.orphans.end(), is_it);
  const auto running = std::find_if(m.slots.begin(), m.slots.end(), is_it);
  if (llm_pending.erase(probe) || llm_waiting.erase(probe) || orphan != m.orphans.end()) {
    if (cache_) cache_->forget(task);
    if (orphan == m.orphans.end()) return;
    const auto place = static_cast<std::int32_t>(orphan - m.orphans.begin());
    m.orphans.erase(orphan);
    drop_member(m.members, ~place);
    for (Member& member : m.members) member.slot += member.slot < ~place;
  } else if (running != m.slots.end()) {
    const auto slot = static_cast<std::int32_t>(running - m.slots.begin());
    if (running->counted)
      uncount(slot, iterating + m.decided);
    else
      drop_other(slot);
    drop_member(m.members, slot), drop_member(m.ahead, slot);
    leave(slot, false);
  }
}

void Device::settle(Ps now) {
  Work& work = m.work;
  if (work.kind != Kind::kIterations || (work.count == 1 && work.end > now)) return;
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
    if (m.work.kind == Kind::kIterations) {
      stats_->llm_busy_ps += now - m.work.start;
      if (m.work.seen.prefill_tokens > 0) stats_->prefill_busy_ps += now - m.work.start;
    }
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
  if (cache_) *cache_ = KvCache(llm_->kv_blocks);
  llm_pending.clear(), llm_waiting.clear(), embed_pending.clear(), embed_waiting.clear();
}

// --- device: starting work -------------------------------------------------------------------------------------------

void Device::start(Ps begin) {
  while (!llm_pending.empty() && llm_pending.front().visible_at <= begin) llm_waiting.push(llm_pending.pop());
  while (!embed_pending.empty() && embed_pending.front().visible_at <= begin) embed_waiting.push(embed_pending.pop());
  const bool llm_has_work = running() > 0 || !llm_waiting.empty();
  if (!embed_waiting.empty() && (m.llm_ran_last || !llm_has_work))
    start_batch(begin);
  else
    start_iterations(begin);
}

void Device::start_batch(Ps begin) {
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
  if (stats_) stats_->embed_tokens += tokens;
  if (embed_->padding) {
    const auto tasks = static_cast<std::int64_t>(m.batch.size());
    tokens = longest * tasks, squares = static_cast<Wide>(longest) * longest * tasks;
  }
  if (stats_) stats_->embed_padded_tokens += tokens;
  const Ps duration = embed_->time.batch(tokens, squares);
  m.work = {
      Kind::kBatch, begin, narrow(static_cast<Wide>(begin) + duration), duration, 0, 1, {0, 0, tokens, longest}, 0};
}

void Device::start_iterations(Ps begin) {
  if (running() == 0 && m.blocks_free != llm_->kv_blocks)
    throw InvariantViolation("invariant 9: nothing runs, but " + std::to_string(m.blocks_free) + " of " +
                             std::to_string(llm_->kv_blocks) + " KV blocks are free");
  m.llm_ran_last = true;
  bool repeats = true;  // the iterations after this one are like it
  if (m.decided && (m.counted > 0 || !m.ahead.empty())) {
    m.members.swap(m.ahead);
  } else {
    m.ahead_doing.reset();
    do repeats = !decide(false, m.members);
    while (m.counted == 0 && m.members.empty());
  }
  const Doing now = m.ahead_doing ? *m.ahead_doing : doing(m.counted, m.counted_kv_tokens, m.members);
  repeats = repeats && !m.ahead_doing;
  m.ahead_doing.reset();
  m.decided = llm_->async_scheduling;
  if (m.decided) repeats = !decide(true, m.ahead) && repeats;
  repeats = repeats && m.others.empty() && m.members.empty() && embed_waiting.empty();
  const Series times = series(now, repeats ? jump_length() : 1);
  Work& work = m.work;
  work = {Kind::kIterations, begin, begin, times.first, times.growth, times.terms, now.seen(), 0};
  work.end = narrow(static_cast<Wide>(begin) + work.span(work.count));
  if (work.count > 1) {
    work.kv_growth = m.counted;
    if (!llm_pending.empty() && (llm_->priority_queue || llm_waiting.empty())) cut(llm_pending.front().visible_at);
    if (!embed_pending.empty()) cut(embed_pending.front().visible_at);
  }
}

// Decides an iteration: the one after the iteration in progress if `flying`, else one that starts now. Counted
// sequences that go on are in it; the others are put in `into`. True if that took a preemption.
bool Device::decide(bool flying, std::vector<Member>& into) {
  into.clear();
  std::int64_t budget = llm_->max_num_batched_tokens;
  bool preempted = false;
  if (!schedule_together(flying, into, budget)) preempted = schedule_one_by_one(flying, into, budget);
  if (!preempted) admit(into, budget);
  return preempted;
}

// Schedules everything that runs, if there are blocks for all of it. Counted sequences may be taken first: whoever runs
// before them took no less when they were admitted, so the budget reaches them, and one whose chunk it cuts is the
// last.
bool Device::schedule_together(bool flying, std::vector<Member>& into, std::int64_t& budget) {
  if (llm_->draft_tokens > 0) return false;
  const std::int64_t round = m.decoded + flying;
  std::int64_t decodes = m.counted, need = m.residues[phase(round)];
  if (flying) {
    for (auto f = m.finishes.rbegin(); f != m.finishes.rend() && f->at == round; ++f) --decodes;
    need -= blocks_not_taken_by_finished(round);
  }
  std::int64_t need_of_all = need, left = budget - decodes;
  for (const std::int32_t slot : m.others) {
    const Sequence& seq = m.slots[at(slot)];
    if (left <= 0) break;
    if (seq.generated + seq.flying >= seq.output_tokens) continue;
    const std::int64_t tokens = seq.prompt_done ? 1 : std::min(chunk(rest(seq)), left);
    need_of_all += blocks(seq.computed + tokens) - seq.blocks;
    left -= tokens;
  }
  if (need_of_all > m.blocks_free) return false;
  take(need);
  budget -= decodes;
  for (const std::int32_t slot : m.others) {
    if (budget <= 0) break;
    Sequence& seq = m.slots[at(slot)];
    if (seq.generated + seq.flying < seq.output_tokens)
      schedule(seq, slot, seq.prompt_done ? 1 : std::min(chunk(rest(seq)), budget), flying, into, budget);
  }
  return true;
}

// The same one sequence at a time, in running order. True if that took a preemption.
bool Device::schedule_one_by_one(bool flying, std::vector<Member>& into, std::int64_t& budget) {
  struct Entry {
    std::int32_t slot;
    bool running = true;
    std::int64_t tokens = 0;  // scheduled
  };
  std::vector<Entry> entries;
  for (std::size_t i = 0; i < m.slots.size(); ++i)
    if (m.slots[i].task >= 0) entries.push_back({static_cast<std::int32_t>(i)});
  auto seq_of = [this](const Entry& entry) -> Sequence& { return m.slots[at(entry.slot)]; };
  std::sort(entries.begin(), entries.end(),
            [&](const Entry& a, const Entry& b) { return seq_of(a).order < seq_of(b).order; });
  auto victim = [&]() -> Entry& {
    Entry* last = nullptr;
    for (Entry& entry : entries)
      if (entry.running && (last == nullptr || !llm_->priority_queue || ByPriority{}(seq_of(*last), seq_of(entry))))
        last = &entry;
    return *last;
  };
  auto ends = [&](const Sequence& seq) {  // its last token is on its way
    const std::int64_t on_its_way = seq.counted ? m.decoded + flying : seq.flying;
    return seq.generated + on_its_way >= seq.output_tokens;
  };

  bool preempted = false;
  std::size_t place = 0;
  for (; place < entries.size() && budget > 0; ++place) {
    Entry& entry = entries[place];
    if (!entry.running || ends(seq_of(entry))) continue;
    const Sequence& seq = seq_of(entry);
    const std::int64_t done = seq.counted ? computed(seq) + flying : seq.computed;
    std::int64_t tokens = 1;
    if (!seq.prompt_done)
      tokens = std::min(chunk(rest(seq)), budget);
    else if (!seq.counted)
      tokens = std::min(1 + llm_->draft_tokens, budget);
    const std::int64_t need = blocks(done + tokens) - (seq.counted ? blocks(done) : seq.blocks);
    while (entry.running && need > m.blocks_free) {
      Entry& out = victim();
      if (out.tokens > 0)
        unschedule(out.slot, flying, into);
      else if (seq_of(out).counted)
        single_out(out.slot, flying);
      budget += out.tokens;
      out.running = false;
      preempt(out.slot, flying);
      preempted = true;
    }
    if (!entry.running) break;
    entry.tokens = tokens;
    if (seq.counted)
      take(need), budget -= tokens;
    else
      schedule(seq_of(entry), entry.slot, tokens, flying, into, budget);
  }
  for (; place < entries.size(); ++place)
    if (entries[place].running && seq_of(entries[place]).counted && !ends(seq_of(entries[place])))
      single_out(entries[place].slot, flying);
  return preempted;
}

void Device::admit(std::vector<Member>& into, std::int64_t budget) {
  const std::int64_t size = llm_->block_size;
  std::int64_t partial = 0;
  if (llm_->max_num_partial_prefills > 0)
    for (const std::int32_t slot : m.others) partial += !m.slots[at(slot)].prompt_done;
  while (budget > 0 && !llm_waiting.empty() && running() < llm_->max_num_seqs) {
    const Sequence& head = llm_waiting.front();
    const std::int64_t tokens = head.input_tokens + head.generated;
    KvCache::Hit hit;
    if (cache_ && !head.prefilled) hit = cache_->find(head.task, size_.full(tokens - 1));
    const std::int64_t done = head.prefilled ? tokens - 1 : hit.blocks * size;
    const std::int64_t most = chunk(tokens - done);
    if (!llm_->chunked_prefill && most > budget) return;
    const std::int64_t now = std::min(most, budget);
    const bool incomplete = done + now < tokens;
    if (incomplete && llm_->max_num_partial_prefills > 0 && partial >= llm_->max_num_partial_prefills) return;
    const std::int64_t wanted = blocks(llm_->reserve_full_prompt ? tokens : done + now);
    const std::int64_t keep = budget < llm_->max_num_batched_tokens ? llm_->watermark_blocks : 0;
    if (wanted - hit.blocks + hit.idle > m.blocks_free - keep) return;
    partial += incomplete;
    Sequence seq = llm_waiting.pop();
    if (cache_ && !seq.prefilled) {
      if (stats_) stats_->prefix_queries += tokens, stats_->prefix_hits += hit.blocks * size;
      cache_->hold(seq.task);
      m.blocks_free -= hit.idle;
    }
    seq.computed = done, seq.blocks = hit.blocks, seq.prompt_done = seq.prefilled;
    const std::int32_t slot = take_slot(seq);
    m.others.push_back(slot);
    schedule(m.slots[at(slot)], slot, now, false, into, budget);
  }
}

// Puts `tokens` more of a sequence that is not counted into an iteration. There are blocks for them.
void Device::schedule(Sequence& seq, std::int32_t slot, std::int64_t tokens, bool flying, std::vector<Member>& into,
                      std::int64_t& budget) {
  Member member{slot, seq.order, tokens, seq.computed, 0, seq.prompt_done};
  const std::int64_t need = std::max<std::int64_t>(0, blocks(seq.computed + tokens) - seq.blocks);
  take(need);
  seq.blocks += need;
  budget -= tokens;
  // A decode whose last iteration is still in progress will be counted when that has ended.
  seq.joins = flying && seq.prompt_done && seq.flying > 0 && llm_->draft_tokens == 0;
  if (seq.prompt_done) {
    if (tokens > 1) {
      const Wide n = seq.verifications++, yield = llm_->draft_yield_ppm;
      member.outputs = static_cast<std::int64_t>((n + 1) * yield / 1'000'000 - n * yield / 1'000'000);
    } else {
      member.outputs = 1;
    }
    member.outputs = std::min({member.outputs, tokens, seq.output_tokens - seq.generated - seq.flying});
    seq.computed += member.outputs;
  } else {
    seq.computed += tokens;
    seq.prompt_done = rest(seq) == 0;
    member.outputs = seq.prompt_done;
    if (cache_) cache_->fill(seq.task, size_.full(seq.computed));
  }
  seq.flying += static_cast<std::int32_t>(member.outputs);
  if (!seq.joins) into.push_back(member);
}

// Takes a sequence out of the iteration that is being decided; it keeps the blocks.
void Device::unschedule(std::int32_t slot, bool flying, std::vector<Member>& into) {
  Sequence& seq = m.slots[at(slot)];
  if (seq.counted) {
    single_out(slot, flying);
    seq.blocks = blocks(seq.computed + 1);
  } else if (seq.joins) {
    seq.joins = false;
    --seq.flying, --seq.computed;
  } else {
    const auto member =
        std::find_if(into.begin(), into.end(), [slot](const Member& other) { return other.slot == slot; });
    seq.flying -= static_cast<std::int32_t>(member->outputs);
    seq.computed -= member->decode ? member->outputs : member->tokens;
    into.erase(member);
  }
}

// New prompt tokens that one iteration may take of `rest`.
std::int64_t Device::chunk(std::int64_t rest) const {
  const std::int64_t threshold = llm_->long_prefill_token_threshold;
  return threshold > 0 ? std::min(rest, threshold) : rest;
}

// Prompt tokens (after a preemption: and generated ones) to be computed.
std::int64_t Device::rest(const Sequence& seq) const {
  return seq.input_tokens + seq.generated + seq.flying - seq.computed;
}

Doing Device::doing(std::int64_t seqs, std::int64_t kv_tokens, const std::vector<Member>& members) const {
  Doing doing;
  IterationWork& work = doing.work;
  work.seqs = seqs, work.kv_tokens = kv_tokens;
  doing.sequences = seqs + static_cast<std::int64_t>(members.size());
  for (const Member& member : members) {
    if (member.decode) {
      work.seqs += member.tokens, work.kv_tokens += member.context;
    } else {
      ++work.chunks, work.prefill_tokens += member.tokens, work.prefill_context += member.context;
      work.attention2 += static_cast<Wide>(member.tokens) * (2 * member.context + member.tokens);
      doing.prompt_tokens = std::max(doing.prompt_tokens, member.context + member.tokens);
    }
  }
  return doing;
}

// What the decided iteration does.
Doing Device::doing_ahead() const {
  std::int64_t seqs = m.counted, kv_tokens = m.counted_kv_tokens;
  if (m.work.kind == Kind::kIterations) {
    kv_tokens += m.counted;
    for (auto f = m.finishes.rbegin(); f != m.finishes.rend() && f->at == m.decoded + 1; ++f) {
      const Sequence& seq = m.slots[at(f->slot)];
      --seqs, kv_tokens -= seq.input_tokens + seq.output_tokens - 1;
    }
    for (const std::int32_t slot : m.others)
      if (m.slots[at(slot)].joins) ++seqs, kv_tokens += m.slots[at(slot)].computed - 1;
  }
  return doing(seqs, kv_tokens, m.ahead);
}

// Durations of an iteration and, if it only decodes, of up to `terms_max` in all like it.
Series Device::series(const Doing& doing, std::int64_t terms_max) const {
  Series times{0, 0, 1};
  if (terms_max > 1)
    times = llm_->time.decode(doing.work.seqs, doing.work.kv_tokens, terms_max);
  else
    times.first = llm_->time.iteration(doing.work);
  if (!host_time_) return times;
  const Wide cpu = (llm_->scheduler_ns + static_cast<Wide>(llm_->scheduler_seq_ns) * doing.sequences) * 1000;
  Wide first = times.first;
  if (doing.work.seqs > 0) first += static_cast<Wide>(llm_->draft_ns) * 1000;
  if (!llm_->async_scheduling) {
    first += cpu;
  } else if (first < cpu) {
    if (times.growth > 0) {
      const Wide below = (cpu - first + times.growth - 1) / times.growth;
      times.terms = static_cast<std::int64_t>(std::min<Wide>(times.terms, below));
    }
    first = cpu, times.growth = 0;
  }
  times.first = narrow(first);
  return times;
}

// Iterations until the first completion, or until blocks run out; those of what is decided are already taken.
std::int64_t Device::jump_length() const {
  std::int64_t most = m.finishes.back().at - m.decoded;
  // The iteration decided during the last of these has fewer members. The head of the queue gets no blocks and no place
  // from that, but perhaps budget, or the watermark no longer holds it back.
  const bool may_admit =
      llm_->watermark_blocks > 0 || !llm_->chunked_prefill || m.counted == llm_->max_num_batched_tokens;
  if (m.decided && may_admit && !llm_waiting.empty()) most = std::max<std::int64_t>(1, most - 1);
  if (m.counted * blocks(most - 1) <= m.blocks_free) return most;
  const std::int64_t from = m.decoded + 1 + m.decided;
  std::int64_t low = 1, high = most;
  while (low < high) {
    const std::int64_t middle = high - (high - low) / 2;
    if (blocks_taken_over(from, middle - 1) <= m.blocks_free)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// --- device: ending work ---------------------------------------------------------------------------------------------

void Device::finish() {
  const Ps end = m.work.end;
  const Ns tell_at = told_at(m.work);
  if (m.work.kind == Kind::kBatch) {
    if (stats_) {
      ++stats_->batches, stats_->embed_busy_ps += end - m.work.start;
      stats_->embed_seen.include(m.work.seen);
    }
    for (const std::int64_t task : m.batch) tell(tell_at, Code::kFinished, task, 0);
    m.batch.clear();
  } else {
    pass(m.work.count);
    finish_iteration(tell_at);
  }
  m.work.kind = Kind::kNothing;
  m.free_at = end;
}

// Accounts for the next `iterations` of the work in progress; they are over.
void Device::pass(std::int64_t iterations) {
  Work& work = m.work;
  const Ps span = work.span(iterations);
  work.seen.decode_kv_tokens += work.kv_growth * (iterations - 1);
  if (stats_) {
    stats_->iterations += iterations, stats_->llm_busy_ps += span;
    if (work.seen.prefill_tokens > 0) stats_->prefill_busy_ps += span;
    stats_->seen.include(work.seen);
    const Ps before = work.start - m.last_iteration_end;  // an embedding batch in between
    stats_->itl.add(work.first + before, 0, 1, m.counted);
    stats_->itl.add(work.first + work.growth, work.growth, iterations - 1, m.counted);
  }
  work.seen.decode_kv_tokens += work.kv_growth;
  const std::int64_t from = m.decoded + 1 + m.decided, more = std::min(iterations, work.count - 1);
  std::int64_t taken = blocks_taken_over(from, more);
  if (m.decided && more > 0) taken -= blocks_not_taken_by_finished(from + more - 1);
  take(taken);
  m.decoded += iterations;
  m.counted_kv_tokens += m.counted * iterations;
  work.start += span, work.first += work.growth * iterations, work.count -= iterations;
  m.last_iteration_end = work.start;
}

// The tokens of the iteration that has ended: first those of decodes, then those of prefills, in running order.
void Device::finish_iteration(Ns tell_at) {
  const auto next = [this] {
    const bool any = !m.finishes.empty() && m.finishes.back().at == m.decoded;
    return any ? m.finishes.back().order : kNone;
  };
  for (const Member& member : m.members)
    if (member.decode) {
      while (next() < member.order) finish_counted(tell_at);
      finish_member(member, tell_at);
    }
  while (next() != kNone) finish_counted(tell_at);
  for (const Member& member : m.members)
    if (!member.decode) finish_member(member, tell_at);
  m.members.clear();
  m.orphans.clear();
}

void Device::finish_counted(Ns tell_at) {
  const std::int32_t slot = m.finishes.back().slot;
  const Sequence& seq = m.slots[at(slot)];
  m.last_told_at = tell_at;
  tell(tell_at, Code::kFinished, seq.task, seq.output_tokens);
  uncount(slot, 0);
  leave(slot, false);
}

void Device::finish_member(const Member& member, Ns tell_at) {
  if (member.outputs == 0) return;  // the prompt goes on in a later iteration
  const bool orphan = member.slot < 0;
  Sequence& seq = orphan ? m.orphans[at(~member.slot)] : m.slots[at(member.slot)];
  seq.flying -= static_cast<std::int32_t>(member.outputs);
  seq.generated += member.outputs;
  if (seq.generated == member.outputs) {
    m.last_told_at = tell_at;
    tell(tell_at, Code::kFirstToken, seq.task, member.outputs);
  } else if (stats_) {
    stats_->itl.add(m.last_iteration_end - seq.last_token_at, 0, 1, 1);
    stats_->itl.add(0, 0, 1, member.outputs - 1);
  }
  seq.last_token_at = m.last_iteration_end;
  const bool ended = seq.generated == seq.output_tokens;
  if (ended) {
    m.last_told_at = tell_at;
    tell(tell_at, Code::kFinished, seq.task, seq.output_tokens);
  }
  if (orphan) {
    if (!ended)
      llm_waiting.push(seq);
    else if (cache_)
      cache_->forget(seq.task);
  } else if (ended) {
    drop_other(member.slot);
    leave(member.slot, false);
  } else if (llm_->draft_tokens == 0 && (seq.joins || !m.decided)) {
    drop_other(member.slot);
    count(member.slot);
  }
}

// --- device: sequences -----------------------------------------------------------------------------------------------

// Sends a sequence that is not counted back to the queue.
void Device::preempt(std::int32_t slot, bool flying) {
  if (stats_) ++stats_->preemptions;
  Sequence seq = m.slots[at(slot)];
  drop_other(slot);
  leave(slot, true);
  seq.computed = seq.blocks = 0;
  seq.prompt_done = seq.prefilled = seq.joins = false;
  if (seq.flying > 0) {
    for (Member& member : m.members)
      if (member.slot == slot) member.slot = ~static_cast<std::int32_t>(m.orphans.size());
    m.orphans.push_back(seq);
  } else {
    if (flying) drop_member(m.members, slot);
    llm_waiting.push(seq);
  }
}

// A sequence is done with its blocks, for good or to start over. Full ones get their contents on the way; the last
// token has none, its keys and values are not computed.
void Device::leave(std::int32_t slot, bool starts_over) {
  const Sequence& seq = m.slots[at(slot)];
  if (cache_) {
    const std::int64_t tokens = std::min(seq.computed, seq.input_tokens + seq.generated + seq.flying - 1);
    m.blocks_free += cache_->give_back(seq.task, seq.blocks, size_.full(tokens), starts_over);
  } else {
    m.blocks_free += seq.blocks;
  }
  m.slots[at(slot)].task = -1;
  m.slots_free.push_back(slot);
}

std::int32_t Device::take_slot(const Sequence& seq) {
  auto slot = static_cast<std::int32_t>(m.slots.size());
  if (m.slots_free.empty()) {
    m.slots.push_back(seq);
  } else {
    slot = m.slots_free.back();
    m.slots_free.pop_back();
    m.slots[at(slot)] = seq;
  }
  m.slots[at(slot)].order = m.orders++;
  return slot;
}

void Device::take(std::int64_t blocks) {
  m.blocks_free -= blocks;
  if (m.blocks_free < 0) throw InvariantViolation("invariant 9: more KV blocks were taken than were free");
  if (cache_) cache_->take(blocks);
}

// From here on it decodes together with the others.
void Device::count(std::int32_t slot) {
  Sequence& seq = m.slots[at(slot)];
  ++m.counted;
  m.counted_kv_tokens += seq.input_tokens + seq.generated - 1;
  seq.counted = true, seq.joins = false;
  seq.generated -= m.decoded;
  ++m.residues[residue(seq)];
  const Finish finish{seq.output_tokens - seq.generated, seq.order, slot};
  m.finishes.insert(std::lower_bound(m.finishes.begin(), m.finishes.end(), finish, later_finish), finish);
}

// From here on it does not; it is in as many `decided` iterations that have not ended.
void Device::uncount(std::int32_t slot, std::int64_t decided) {
  Sequence& seq = m.slots[at(slot)];
  const Finish finish{seq.output_tokens - seq.generated, seq.order, slot};
  m.finishes.erase(std::lower_bound(m.finishes.begin(), m.finishes.end(), finish, later_finish));
  --m.residues[residue(seq)];
  const std::int64_t context = computed(seq);
  --m.counted;
  m.counted_kv_tokens -= context;
  seq.counted = false;
  seq.generated += m.decoded;
  seq.flying = static_cast<std::int32_t>(std::min(decided, seq.output_tokens - seq.generated));
  seq.computed = context + seq.flying;
  seq.blocks = blocks(seq.computed);
  seq.last_token_at = m.last_iteration_end;
}

// Makes a counted sequence one of the others, of the iteration in progress as well if there is one.
void Device::single_out(std::int32_t slot, bool flying) {
  uncount(slot, flying);
  const Sequence& seq = m.slots[at(slot)];
  const auto place = std::find_if(m.others.begin(), m.others.end(),
                                  [&](std::int32_t other) { return m.slots[at(other)].order > seq.order; });
  m.others.insert(place, slot);
  if (!flying) return;
  const auto before =
      std::find_if(m.members.begin(), m.members.end(), [&](const Member& other) { return other.order > seq.order; });
  m.members.insert(before, {slot, seq.order, 1, seq.computed - 1, 1, true});
}

void Device::drop_other(std::int32_t slot) { m.others.erase(std::find(m.others.begin(), m.others.end(), slot)); }

void Device::drop_member(std::vector<Member>& members, std::int32_t slot) {
  members.erase(std::remove_if(members.begin(), members.end(), [slot](const Member& m) { return m.slot == slot; }),
                members.end());
}

std::int64_t Device::computed(const Sequence& counted) const {
  return counted.input_tokens + counted.generated + m.decoded - 1;
}

std::size_t Device::residue(const Sequence& counted) const {
  return static_cast<std::size_t>(size_.rest(counted.input_tokens + counted.generated - 1));
}

// The residue of the counted sequences that take a block in iteration `round` (a value of Moment::decoded).
std::size_t Device::phase(std::int64_t round) const { return static_cast<std::size_t>(size_.rest(-round)); }

std::int64_t Device::blocks(std::int64_t tokens) const { return size_.blocks(tokens); }

// Blocks that the counted sequences take in iterations `from`, `from + 1`, ... (as values of Moment::decoded).
std::int64_t Device::blocks_taken_over(std::int64_t from, std::int64_t iterations) const {
  if (iterations == 0) return 0;
  const std::int64_t odd = size_.rest(iterations);
  std::int64_t taken = size_.full(iterations) * m.counted;
  for (std::int64_t round = from; round < from + odd; ++round) taken += m.residues[phase(round)];
  return taken;
}

// Those that they would take in iteration `round`, were they not finished by then.
std::int64_t Device::blocks_not_taken_by_finished(std::int64_t round) const {
  std::int64_t blocks = 0;
  for (auto f = m.finishes.rbegin(); f != m.finishes.rend() && f->at == round; ++f)
    blocks += residue(m.slots[at(f->slot)]) == phase(round);
  return blocks;
}

// --- engine ----------------------------------------------------------------------------------------------------------

Engine::Engine(std::optional<LlmConfig> llm, std::optional<EmbedConfig> embed)
    : llm_(llm),
      embed_(embed),
      stats_(std::make_unique<Stats>()),
      cache_(llm && llm->prefix_caching ? std::make_unique<KvCache>(llm->kv_blocks) : nullptr),
      device_(llm, embed, cache_.get(), stats_.get()),
      ahead_(llm, embed, cache_.get(), nullptr) {}

void Engine::submit_llm(Ns now, std::int64_t task, std::int64_t input_tokens, std::int64_t output_tokens,
                        std::int64_t priority, std::vector<std::int64_t> contents, bool prefilled) {
  if (!llm_) throw IllegalEvent("this device has no LLM engine");
  check_tokens(task, input_tokens);
  check_tokens(task, output_tokens);
  if (std::any_of(contents.begin(), contents.end(), [](std::int64_t content) { return content < 0; }))
    throw IllegalEvent("task " + std::to_string(task) + ": expected contents from 0 to " + std::to_string(kNone));
  const Key key = enter(now, task, llm_->priority_queue ? priority : 0);
  if (llm_->longest_sequence > 0 && input_tokens + output_tokens > llm_->longest_sequence)
    return device_.tell(now, Code::kFailed, task, -(input_tokens + output_tokens));
  const std::int64_t needed = ceil_div(input_tokens + output_tokens - 1 + llm_->draft_tokens, llm_->block_size);
  if (needed > llm_->kv_blocks) return device_.tell(now, Code::kFailed, task, needed);
  Sequence seq;
  seq.task = task, seq.priority = key.priority, seq.arrival = key.arrival;
  Ns done = now;
  if (const Ns work = llm_->api_server_ns + llm_->api_server_token_ns * input_tokens; work > 0)
    done = tokenised_ = narrow(static_cast<Wide>(std::max(now, tokenised_)) + work);
  seq.visible_at = narrow((static_cast<Wide>(done) + llm_->ingress_ns) * 1000);
  seq.input_tokens = input_tokens, seq.output_tokens = output_tokens, seq.prefilled = prefilled;
  if (cache_) cache_->enter(task, std::move(contents));
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
  const Key* key = known_.find(task);
  if (!key) return false;
  device_.remove(to_ps(now), task, *key);
  known_.erase(task);
  wakeup_at_.reset();
  return true;
}

void Engine::clear(Ns now) {
  run(now);
  device_.clear(to_ps(now));
  tokenised_ = 0;
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
  if (!known_.emplace(task, Key(key)).second)
    throw IllegalEvent("task " + std::to_string(task) + " was submitted twice");
  ++arrivals_;
  wakeup_at_.reset();
  return key;
}

std::int64_t Engine::waiting() const { return device_.waiting() + visible(device_.llm_pending); }

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

std::vector<std::int64_t> Engine::generated(const std::vector<std::int64_t>& tasks) {
  device_.settle(to_ps(now_));
  const Moment& m = device_.m;
  IdMap<std::int64_t> generated;
  const auto tokens = [&m](const Sequence& seq) { return seq.generated + (seq.counted ? m.decoded : 0); };
  for (const Sequence& seq : m.slots)
    if (seq.task >= 0) generated[seq.task] = tokens(seq);
  for (const Sequence& orphan : m.orphans) generated[orphan.task] = tokens(orphan);
  for (const Sequence& preempted : device_.llm_waiting.own())
    if (preempted.generated > 0) generated[preempted.task] = preempted.generated;
  for (const Told& t : m.outbox)
    if (t.code == Code::kFinished) generated[t.task] = t.value;
  std::vector<std::int64_t> counts;
  counts.reserve(tasks.size());
  for (const std::int64_t task : tasks) {
    const std::int64_t* count = generated.find(task);
    counts.push_back(count ? *count : 0);
  }
  return counts;
}

Ns Engine::boundary_at() {
  device_.settle(to_ps(now_));
  const Work& work = device_.m.work;
  Ps at = work.end;
  if (work.kind == Kind::kIterations) at = work.start + work.span(1);
  if (work.kind == Kind::kNothing) at = device_.next_start();
  return at == kNone ? kNone : std::max(now_ + 1, ceil_div(at, 1000));
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

Ns Engine::prefill_busy_ns() const {
  const Work& work = device_.m.work;
  const bool prefills = work.kind == Kind::kIterations && work.seen.prefill_tokens > 0;
  return (stats_->prefill_busy_ps + (prefills ? to_ps(now_) - work.start : 0)) / 1000;
}

// --- binding ---------------------------------------------------------------------------------------------------------

namespace py = pybind11;

namespace {

LlmConfig llm_config(const Numbers& n) {
  LlmConfig config{};
  config.time = IterationTime(n);
  config.max_num_seqs = number(n, "max_num_seqs", 1);
  config.max_num_batched_tokens = number(n, "max_num_batched_tokens", 1);
  config.block_size = number(n, "block_size", 1);
  config.kv_blocks = number(n, "kv_blocks", 1);
  config.chunked_prefill = number(n, "chunked_prefill", 0) != 0;
  config.priority_queue = number(n, "priority_queue", 0) != 0;
  config.reserve_full_prompt = number(n, "scheduler_reserve_full_isl", 0) != 0;
  config.prefix_caching = number(n, "prefix_caching", 0) != 0;
  config.async_scheduling = number(n, "async_scheduling", 0) != 0;
  config.long_prefill_token_threshold = number(n, "long_prefill_token_threshold", 0);
  config.max_num_partial_prefills = number(n, "max_num_partial_prefills", 0);
  config.watermark_blocks = number(n, "watermark_blocks", 0);
  config.longest_sequence = number(n, "max_model_len", 0);
  config.draft_tokens = number(n, "draft_tokens", 0);
  config.draft_yield_ppm = number(n, "draft_yield_ppm", 1'000'000);
  config.draft_ns = number(n, "draft_ns", 0);
  config.scheduler_ns = number(n, "scheduler_ns", 0);
  config.scheduler_seq_ns = number(n, "scheduler_seq_ns", 0);
  config.api_server_ns = number(n, "api_server_ns", 0);
  config.api_server_token_ns = number(n, "api_server_token_ns", 0);
  config.ingress_ns = number(n, "ingress_ns", 0);
  config.egress_ns = number(n, "egress_ns", 0);
  config.detokenizer_token_ns = number(n, "detokenizer_token_ns", 0);
  // Every counted sequence advances in every iteration; the sums rest on it.
  if (config.max_num_batched_tokens < config.max_num_seqs)
    throw std::invalid_argument("engine: max_num_batched_tokens: expected at least max_num_seqs");
  if (!config.chunked_prefill &&
      (config.longest_sequence == 0 || config.longest_sequence > config.max_num_batched_tokens))
    config.longest_sequence = config.max_num_batched_tokens;
  return config;
}

EmbedConfig embed_config(const Numbers& n) {
  return {IterationTime(n),
          number(n, "max_batch_tasks", 1),
          number(n, "max_batch_tokens", 1),
          number(n, "padding", 0) != 0,
          number(n, "ingress_ns", 0),
          number(n, "egress_ns", 0)};
}

py::tuple seen_tuple(const Seen& seen) {
  return py::make_tuple(seen.decode_seqs, seen.decode_kv_tokens, seen.prefill_tokens, seen.prompt_tokens);
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
           py::arg("output_tokens"), py::arg("priority"), py::arg("contents") = std::vector<std::int64_t>{},
           py::arg("prefilled") = false)
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
      .def("generated", &Engine::generated, py::arg("tasks"))
      .def_property_readonly("boundary_at", &Engine::boundary_at)
      .def_property_readonly("running", &Engine::running)
      .def_property_readonly("waiting", &Engine::waiting)
      .def_property_readonly("kv_blocks_free", &Engine::kv_blocks_free)
      .def_property_readonly("iterations", [](Engine& engine) { return engine.stats().iterations; })
      .def_property_readonly("preemptions", [](Engine& engine) { return engine.stats().preemptions; })
      .def_property_readonly("prefix_queries", [](Engine& engine) { return engine.stats().prefix_queries; })
      .def_property_readonly("prefix_hits", [](Engine& engine) { return engine.stats().prefix_hits; })
      .def_property_readonly("seen", [](Engine& engine) { return seen_tuple(engine.stats().seen); })
      .def_property_readonly("embed_seen", [](Engine& engine) { return seen_tuple(engine.stats().embed_seen); })
      .def_property_readonly("embed_tokens", [](Engine& engine) { return engine.stats().embed_tokens; })
      .def_property_readonly("embed_padded_tokens", [](Engine& engine) { return engine.stats().embed_padded_tokens; })
      .def_property_readonly("prefill_busy_ns", &Engine::prefill_busy_ns)
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
