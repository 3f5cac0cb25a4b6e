#include "sage/iteration.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace sage {

std::int64_t narrow(Wide value) {
  if (value > std::numeric_limits<std::int64_t>::max() - 1)
    throw std::overflow_error("simulated time passed 2^63 ps (106 days)");
  return static_cast<std::int64_t>(value);
}

Wide IterationTime::prefill(std::int64_t tokens, Wide attention2) const {
  const Wide line = prefill_base + static_cast<Wide>(prefill_token) * tokens + prefill_attn * attention2 / 2;
  return std::max<Wide>(prefill_floor, line);
}

Ps IterationTime::iteration(const IterationWork& work) const {
  const Wide decode = static_cast<Wide>(decode_seq) * work.seqs + static_cast<Wide>(decode_kv) * work.kv_tokens;
  if (work.prefill_tokens == 0) return narrow(overhead + decode_base + decode);
  return narrow(
      std::max<Wide>(1, overhead + prefill(work.prefill_tokens, work.attention2) + decode * mixed_permille / 1000));
}

Series IterationTime::decode(std::int64_t seqs, std::int64_t kv_tokens, std::int64_t terms_max) const {
  return {iteration({seqs, kv_tokens}), narrow(static_cast<Wide>(decode_kv) * seqs), terms_max};
}

Ps IterationTime::batch(std::int64_t tokens, Wide attention2) const {
  return narrow(std::max<Wide>(1, overhead + prefill(tokens, attention2)));
}

}  // namespace sage
