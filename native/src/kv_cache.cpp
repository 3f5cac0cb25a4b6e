#include "sage/kv_cache.hpp"

#include <algorithm>

namespace sage {

KvCache::KvCache(std::int64_t blocks) { append_blank(blocks); }

void KvCache::enter(std::int64_t task, std::vector<std::int64_t> contents) {
  if (!contents.empty()) tables_[task].contents = std::move(contents);
}

KvCache::Hit KvCache::find(std::int64_t task, std::int64_t blocks_max) {
  Hit hit;
  hits_.clear();
  own_hits_ = 0;
  const auto entry = tables_.find(task);
  if (entry == tables_.end()) return hit;
  const Table& table = entry->second;
  const auto given = static_cast<std::int64_t>(table.contents.size());
  while (hit.blocks < std::min(given, blocks_max)) {
    const auto block = found_.find(table.contents[static_cast<std::size_t>(hit.blocks)]);
    if (block == found_.end()) return hit;
    hits_.push_back(block->second);
    hit.idle += nodes_[static_cast<std::size_t>(block->second)].users == 0;
    ++hit.blocks;
  }
  if (table.own != kNil && blocks_max > given) {
    own_hits_ = std::min(nodes_[static_cast<std::size_t>(table.own)].count, blocks_max - given);
    hit.blocks += own_hits_, hit.idle += own_hits_;
  }
  return hit;
}

void KvCache::hold(std::int64_t task) {
  if (hits_.empty() && own_hits_ == 0) return;
  note(task);
  Table& table = tables_[task];
  for (const Index index : hits_) {
    Node& node = edit(index);
    if (node.users++ == 0) unlink(index);
  }
  table.nodes = hits_;
  if (own_hits_ == 0) return;
  Node& run = edit(table.own);
  run.count -= own_hits_;
  run.owner = -1;
  if (run.count == 0) unlink(table.own), drop(table.own);
  table.own = kNil;
}

void KvCache::take(std::int64_t blocks) {
  while (blocks > 0) {
    const Index index = queue_.first;
    Node& node = edit(index);
    const std::int64_t taken = std::min(blocks, node.count);
    blocks -= taken, node.count -= taken;
    if (node.count > 0) return;
    if (node.content >= 0) withdraw(index);
    if (node.owner >= 0) {
      note(node.owner);
      tables_[node.owner].own = kNil;
    }
    unlink(index);
    drop(index);
  }
}

void KvCache::fill(std::int64_t task, std::int64_t blocks) {
  const auto entry = tables_.find(task);
  if (entry == tables_.end()) return;
  note(task);
  publish(entry->second, blocks);
}

std::int64_t KvCache::give_back(std::int64_t task, std::int64_t held, std::int64_t full, bool starts_over) {
  auto entry = tables_.find(task);
  std::int64_t given = 0;
  if (entry != tables_.end()) {
    note(task);
    publish(entry->second, full);
    given = static_cast<std::int64_t>(entry->second.nodes.size());
  }
  const std::int64_t own = starts_over ? std::max<std::int64_t>(0, full - given) : 0;
  append_blank(held - given - own);
  if (own > 0) {
    if (entry == tables_.end()) {
      note(task);
      entry = tables_.emplace(task, Table{}).first;
    }
    Node run;
    run.count = own, run.owner = task;
    entry->second.own = make(run);
    append(entry->second.own);
  }
  std::int64_t freed = held - given;
  if (entry == tables_.end()) return freed;
  std::vector<Index>& nodes = entry->second.nodes;
  for (; !nodes.empty(); nodes.pop_back()) {
    if (--edit(nodes.back()).users > 0) continue;
    append(nodes.back());
    ++freed;
  }
  if (!starts_over) erase(entry);
  return freed;
}

void KvCache::forget(std::int64_t task) {
  const auto entry = tables_.find(task);
  if (entry == tables_.end()) return;
  note(task);
  if (entry->second.own != kNil) edit(entry->second.own).owner = -1;
  erase(entry);
}

// --- undoing ---------------------------------------------------------------------------------------------------------

void KvCache::mark() {
  marked_ = true;
  old_queue_ = queue_;
  old_size_ = nodes_.size();
}

void KvCache::roll_back() {
  marked_ = false;
  for (; !old_nodes_.empty(); old_nodes_.pop_back())
    nodes_[static_cast<std::size_t>(old_nodes_.back().first)] = old_nodes_.back().second;
  for (; !old_found_.empty(); old_found_.pop_back()) set_found(old_found_.back().first, old_found_.back().second);
  for (; !old_tables_.empty(); old_tables_.pop_back()) {
    OldTable& old = old_tables_.back();
    if (!old.present) {
      tables_.erase(old.task);
      continue;
    }
    Table& table = tables_[old.task];
    if (!old.table.contents.empty()) table.contents = std::move(old.table.contents);
    table.nodes = std::move(old.table.nodes);
    table.own = old.table.own;
  }
  nodes_.resize(old_size_);
  queue_ = old_queue_;
}

KvCache::Node& KvCache::edit(Index index) {
  Node& node = nodes_[static_cast<std::size_t>(index)];
  if (marked_) old_nodes_.emplace_back(index, node);
  return node;
}

void KvCache::set_found(std::int64_t content, Index index) {
  if (marked_) {
    const auto entry = found_.find(content);
    old_found_.emplace_back(content, entry == found_.end() ? kNil : entry->second);
  }
  if (index == kNil)
    found_.erase(content);
  else
    found_[content] = index;
}

void KvCache::note(std::int64_t task) {
  if (!marked_) return;
  const auto entry = tables_.find(task);
  if (entry == tables_.end())
    old_tables_.push_back({task, false, {}});
  else
    old_tables_.push_back({task, true, {{}, entry->second.nodes, entry->second.own}});
}

void KvCache::erase(std::unordered_map<std::int64_t, Table>::iterator entry) {
  if (marked_) old_tables_.push_back({entry->first, true, std::move(entry->second)});
  tables_.erase(entry);
}

// --- nodes -----------------------------------------------------------------------------------------------------------

KvCache::Index KvCache::make(const Node& node) {
  if (queue_.spare == kNil) {
    nodes_.push_back(node);
    return static_cast<Index>(nodes_.size() - 1);
  }
  const Index index = queue_.spare;
  Node& spare = edit(index);
  queue_.spare = spare.twin;
  spare = node;
  return index;
}

void KvCache::drop(Index index) {
  edit(index).twin = queue_.spare;
  queue_.spare = index;
}

void KvCache::append(Index index) {
  Node& node = edit(index);
  node.before = queue_.last, node.after = kNil;
  (queue_.last == kNil ? queue_.first : edit(queue_.last).after) = index;
  queue_.last = index;
}

void KvCache::unlink(Index index) {
  const Node& node = nodes_[static_cast<std::size_t>(index)];
  (node.before == kNil ? queue_.first : edit(node.before).after) = node.after;
  (node.after == kNil ? queue_.last : edit(node.after).before) = node.before;
}

void KvCache::append_blank(std::int64_t count) {
  if (count == 0) return;
  if (queue_.last != kNil) {
    const Node& last = nodes_[static_cast<std::size_t>(queue_.last)];
    if (last.content < 0 && last.owner < 0) {
      edit(queue_.last).count += count;
      return;
    }
  }
  Node run;
  run.count = count;
  append(make(run));
}

// --- contents --------------------------------------------------------------------------------------------------------

void KvCache::publish(Table& table, std::int64_t blocks) {
  const auto until = static_cast<std::size_t>(std::min(blocks, static_cast<std::int64_t>(table.contents.size())));
  while (table.nodes.size() < until) {
    Node node;
    node.content = table.contents[table.nodes.size()], node.users = 1;
    const Index index = make(node);
    table.nodes.push_back(index);
    const auto first = found_.find(node.content);
    if (first == found_.end()) {
      set_found(node.content, index);
      continue;
    }
    Index last = first->second;
    while (nodes_[static_cast<std::size_t>(last)].twin != kNil) last = nodes_[static_cast<std::size_t>(last)].twin;
    edit(last).twin = index;
  }
}

void KvCache::withdraw(Index index) {
  const Node& node = nodes_[static_cast<std::size_t>(index)];
  Index other = found_.at(node.content);
  if (other == index) return set_found(node.content, node.twin);
  while (nodes_[static_cast<std::size_t>(other)].twin != index) other = nodes_[static_cast<std::size_t>(other)].twin;
  edit(other).twin = node.twin;
}

}  // namespace sage
