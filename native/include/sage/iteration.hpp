// How long one iteration takes, in whole picoseconds: the twin of sage_sim/iteration.py, which gives the formulas.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

namespace sage {

using Ps = std::int64_t;  // picoseconds of device time; ends after 2^63 ps = 106 days

__extension__ typedef __int128 Wide;  // products of times and token counts, narrowed with a check

std::int64_t narrow(Wide value);  // throws std::overflow_error past 2^63 - 2

// A configuration as Python gives it: whole numbers, and rows of them, by name.
using Row = std::vector<std::int64_t>;
using Numbers = std::map<std::string, std::variant<std::int64_t, Row>>;

std::int64_t number(const Numbers& numbers, const char* key, std::int64_t least);  // throws std::invalid_argument

// What one LLM iteration works on. A chunk is the part of one prompt that it prefills.
struct IterationWork {
  std::int64_t seqs = 0;             // decoding sequences
  std::int64_t kv_tokens = 0;        // their context, in all
  std::int64_t chunks = 0;           // prompts of which a chunk is prefilled
  std::int64_t prefill_tokens = 0;   // new prompt tokens, over all chunks
  std::int64_t prefill_context = 0;  // tokens computed before, under the chunks
  Wide attention2 = 0;               // sum over chunks of p * (2 * context + p)
};

// Successive iterations of one unchanging batch: `first`, `first + growth`, ... for `terms` of them.
struct Series {
  Ps first, growth;
  std::int64_t terms;
};

// The law. Copies share the tables.
class IterationTime {
 public:
  IterationTime() = default;  // to be assigned
  explicit IterationTime(const Numbers& numbers);

  Ps iteration(const IterationWork& work) const;
  // Iterations that only decode `seqs` sequences of `kv_tokens` context, which grows by `seqs` an iteration: the
  // durations for as long as they form one arithmetic series, at most `terms_max` (from 1).
  Series decode(std::int64_t seqs, std::int64_t kv_tokens, std::int64_t terms_max) const;
  Ps batch(std::int64_t tokens, Wide attention2) const;  // of an embedding engine

 private:
  // Times over one axis.
  struct Curve {
    Row knots, ps;
    Ps at(std::int64_t x) const;
  };
  // Times over decoding sequences and their mean context, a row of contexts for each knot of sequences.
  struct Table {
    Row seqs, contexts, ps;
    Series attention(std::int64_t seqs, std::int64_t kv_tokens) const;
  };
  struct Tables {
    Curve token, head, prefill;
    Table decode, mixed;
    std::int64_t mixed_token, prefill_pair, prefill_context, overhead;
  };

  Ps prefill(std::int64_t tokens, Wide attention2, std::int64_t context) const;

  std::shared_ptr<const Tables> tables_;
};

}  // namespace sage
