// A map from ids to values for the hot path: ids are dense and short-lived, so a table of the live ones stays small.
// Open addressing with linear probing and no tombstones; values live in slots that never move, so a reference stays
// good until its id is erased. Iteration has no order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sage {

template <class T>
class IdMap {
 public:
  T* find(std::int64_t id) {
    const std::size_t at = place(id);
    return cells_[at].slot == kEmpty ? nullptr : &slots_[cells_[at].slot];
  }
  const T* find(std::int64_t id) const { return const_cast<IdMap*>(this)->find(id); }
  const T& at(std::int64_t id) const { return const_cast<IdMap*>(this)->at(id); }
  T& at(std::int64_t id) {
    T* found = find(id);
    if (!found) throw std::out_of_range("id " + std::to_string(id) + " is not in the map");
    return *found;
  }
  bool count(std::int64_t id) const { return find(id) != nullptr; }
  // The value and whether it is new; one that was there stays as it is.
  std::pair<T*, bool> emplace(std::int64_t id, T&& value) {
    std::size_t at = place(id);
    if (cells_[at].slot != kEmpty) return {&slots_[cells_[at].slot], false};
    if (++size_ * 2 > cells_.size()) {
      grow();
      at = place(id);
    }
    std::uint32_t slot;
    if (free_.empty()) {
      slot = static_cast<std::uint32_t>(slots_.size());
      slots_.push_back(std::move(value));
    } else {
      slot = free_.back();
      free_.pop_back();
      slots_[slot] = std::move(value);
    }
    cells_[at] = {id, slot};
    return {&slots_[slot], true};
  }
  T& operator[](std::int64_t id) { return *emplace(id, T{}).first; }
  bool erase(std::int64_t id) {
    std::size_t hole = place(id);
    if (cells_[hole].slot == kEmpty) return false;
    slots_[cells_[hole].slot] = T{};
    free_.push_back(cells_[hole].slot);
    --size_;
    // What follows moves up where that brings it nearer to its home.
    const std::size_t mask = cells_.size() - 1;
    for (std::size_t next = (hole + 1) & mask; cells_[next].slot != kEmpty; next = (next + 1) & mask) {
      const std::size_t home = home_of(cells_[next].id);
      if (((next - home) & mask) >= ((next - hole) & mask)) cells_[hole] = cells_[next], hole = next;
    }
    cells_[hole].slot = kEmpty;
    return true;
  }
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  void clear() { *this = IdMap(); }
  template <class Visit>
  void each(Visit visit) const {
    for (const Cell& cell : cells_)
      if (cell.slot != kEmpty) visit(cell.id, slots_[cell.slot]);
  }

 private:
  static constexpr std::uint32_t kEmpty = UINT32_MAX;
  struct Cell {
    std::int64_t id = 0;
    std::uint32_t slot = kEmpty;
  };
  std::size_t home_of(std::int64_t id) const {
    return static_cast<std::size_t>(static_cast<std::uint64_t>(id) * 0x9e3779b97f4a7c15ULL >> shift_);
  }
  // Where the id is, or the empty cell where it would be.
  std::size_t place(std::int64_t id) const {
    const std::size_t mask = cells_.size() - 1;
    std::size_t at = home_of(id);
    while (cells_[at].slot != kEmpty && cells_[at].id != id) at = (at + 1) & mask;
    return at;
  }
  void grow() {
    const std::vector<Cell> before = std::move(cells_);
    cells_.assign(before.size() * 2, Cell{});
    --shift_;
    for (const Cell& cell : before)
      if (cell.slot != kEmpty) cells_[place(cell.id)] = cell;
  }

  std::vector<Cell> cells_ = std::vector<Cell>(16);
  int shift_ = 60;  // 64 - log2(cells)
  std::deque<T> slots_;
  std::vector<std::uint32_t> free_;
  std::size_t size_ = 0;
};

}  // namespace sage
