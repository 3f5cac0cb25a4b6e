// Which KV blocks can still be found by their content, and in which order free ones are reused: the twin of
// sage_sim/kv_cache_reference.py, for an engine with prefix caching (without it only the number of blocks matters).
//
// Nothing is kept per block that nobody else can ask for. Free blocks form one queue of runs: a number of blocks
// without a content, the own blocks of a preempted task (which it may take back), or one block with a given content.
// Blocks of a running sequence have a node here only where their content was given by the load, so a task without given
// contents costs O(1), and the others what they touch.
//
// A lookahead works on the same object: between mark() and roll_back() every change is noted and undone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace sage {

class KvCache {
 public:
  explicit KvCache(std::int64_t blocks);

  struct Hit {
    std::int64_t blocks = 0;  // from the first on
    std::int64_t idle = 0;    // of those, the ones that are free
  };

  void enter(std::int64_t task, std::vector<std::int64_t> contents);  // before anything else is asked about it
  Hit find(std::int64_t task, std::int64_t blocks_max);
  void hold(std::int64_t task);                       // what the last find() found; the task holds nothing else yet
  void take(std::int64_t blocks);                     // the next free ones
  void fill(std::int64_t task, std::int64_t blocks);  // its first blocks are full, as far as their contents were given
  // The task is done with its `held` blocks, the first `full` of which are full, for good or to start over. Tells how
  // many of them are free now.
  std::int64_t give_back(std::int64_t task, std::int64_t held, std::int64_t full, bool starts_over);
  void forget(std::int64_t task);  // it is gone, and holds nothing

  void mark();
  void roll_back();

 private:
  using Index = std::int32_t;
  static constexpr Index kNil = -1;

  struct Node {
    std::int64_t count = 1;             // blocks of a run
    std::int64_t content = -1;          // -1: a run
    std::int64_t owner = -1;            // of a run: the preempted task whose own blocks these are
    Index before = kNil, after = kNil;  // in the queue
    Index twin = kNil;                  // the next block of the same content, or the next spare node
    std::int32_t users = 0;
  };

  struct Table {  // of a task: what is to be remembered about its blocks
    std::vector<std::int64_t> contents;
    std::vector<Index> nodes;  // its blocks with a given content, the first ones
    Index own = kNil;          // the run of its own blocks in the queue, right after those of given content
  };

  struct Queue {
    Index first = kNil, last = kNil;
    Index spare = kNil;  // a chain of unused nodes
  };

  struct OldTable {
    std::int64_t task;
    bool present;
    Table table;  // its contents are left out where the table was not erased
  };

  Node& edit(Index index);
  Index make(const Node& node);
  void drop(Index index);
  void append(Index index);
  void unlink(Index index);
  void append_blank(std::int64_t count);
  void publish(Table& table, std::int64_t blocks);
  void withdraw(Index index);
  void set_found(std::int64_t content, Index index);
  void note(std::int64_t task);
  void erase(std::unordered_map<std::int64_t, Table>::iterator entry);

  std::vector<Node> nodes_;
  Queue queue_;
  std::unordered_map<std::int64_t, Index> found_;  // content to the block that has had it longest
  std::unordered_map<std::int64_t, Table> tables_;
  std::vector<Index> hits_;  // of the last find()
  std::int64_t own_hits_ = 0;

  bool marked_ = false;
  Queue old_queue_;
  std::size_t old_size_ = 0;
  std::vector<std::pair<Index, Node>> old_nodes_;
  std::vector<std::pair<std::int64_t, Index>> old_found_;  // kNil: was absent
  std::vector<OldTable> old_tables_;
};

}  // namespace sage
