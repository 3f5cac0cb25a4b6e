#include "sage/columns.hpp"

#include <limits>
#include <stdexcept>

namespace sage::columns {

Taken Column::take() {
  Taken taken{nulls_, {}};
  taken.buffers.push_back(nulls_ > 0 ? valid_.take() : Buffer{});
  take_values(taken);
  rows_ = nulls_ = 0;
  return taken;
}

Word Words::of(Label label) {
  const auto [found, added] = words_.try_emplace(label, static_cast<Word>(labels_.size()));
  if (added) labels_.push_back(label);
  return found->second;
}

std::int32_t Labels::code(std::size_t word) {
  if (word >= code_of_.size()) code_of_.resize(word + 1, -1);
  std::int32_t& code = code_of_[word];
  if (code < 0) {
    code = static_cast<std::int32_t>(dictionary_.size());
    dictionary_.push_back(static_cast<Word>(word));
  }
  return code;
}

void Labels::take_values(Taken& to) {
  to.buffers.push_back(Buffer::of(std::exchange(codes_, {})));
  std::vector<std::int32_t> offsets{0};
  std::vector<char> bytes;
  for (const Word word : dictionary_) {
    const std::string& text = words_.text(word);
    bytes.insert(bytes.end(), text.begin(), text.end());
    offsets.push_back(static_cast<std::int32_t>(bytes.size()));
    code_of_[static_cast<std::size_t>(word)] = -1;
  }
  to.labels = static_cast<std::int64_t>(dictionary_.size());
  to.buffers.push_back(Buffer::of(std::move(offsets)));
  to.buffers.push_back(Buffer::of(std::move(bytes)));
  dictionary_.clear();
}

void Binary::push(std::string_view value) {
  if (bytes_.size() + value.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()))
    throw std::length_error(std::string("column ") + name + ": more than 2 GiB and nobody took them");
  bytes_.insert(bytes_.end(), value.begin(), value.end());
  offsets_.push_back(static_cast<std::int32_t>(bytes_.size()));
  mark(true);
}

void Binary::take_values(Taken& to) {
  to.buffers.push_back(Buffer::of(std::exchange(offsets_, {0})));
  to.buffers.push_back(Buffer::of(std::exchange(bytes_, {})));
}

}  // namespace sage::columns
