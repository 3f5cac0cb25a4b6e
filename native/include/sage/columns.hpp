// Append-only columns in Arrow's layout: what pyarrow reads without a copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sage/words.hpp"

namespace sage::columns {

// Memory handed out as it is; whoever holds a Buffer keeps it alive.
struct Buffer {
  std::shared_ptr<const void> owner;
  const void* data = nullptr;
  std::size_t bytes = 0;

  template <class T>
  static Buffer of(std::vector<T>&& values) {
    values.reserve(1);  // an address even where there is nothing
    auto kept = std::make_shared<const std::vector<T>>(std::move(values));
    return {kept, kept->data(), kept->size() * sizeof(T)};
  }
};

// What a column held. buffers: as pyarrow.Array.from_buffers takes them: validity (without an owner: no nulls), data.
struct Taken {
  std::int64_t nulls;
  std::vector<Buffer> buffers;
  std::int64_t labels = -1;  // in the dictionary, whose buffers are the last two; -1: a column without one
};

class Bits {
 public:
  void push(bool bit) {
    if (count_ % 8 == 0) bytes_.push_back(0);
    bytes_.back() = static_cast<std::uint8_t>(bytes_.back() | bit << count_ % 8);
    ++count_;
  }
  Buffer take() {
    count_ = 0;
    return Buffer::of(std::exchange(bytes_, {}));
  }

 private:
  std::vector<std::uint8_t> bytes_;
  std::int64_t count_ = 0;
};

// Counts the rows and knows which are null; the values are with the kinds of column below.
class Column {
 public:
  Column(std::vector<Column*>& table, const char* named, const char* typed) : name(named), type(typed) {
    table.push_back(this);
  }
  Column(const Column&) = delete;
  Column& operator=(const Column&) = delete;
  virtual ~Column() = default;

  const char* const name;
  const char* const type;  // as pyarrow spells it
  std::int64_t rows() const { return rows_; }
  Taken take();  // leaves the column empty

 protected:
  void mark(bool valid) {
    if (!valid && nulls_++ == 0)
      for (std::int64_t i = 0; i < rows_; ++i) valid_.push(true);
    if (nulls_ > 0) valid_.push(valid);
    ++rows_;
  }
  virtual void take_values(Taken& to) = 0;

 private:
  Bits valid_;  // from the first null on
  std::int64_t rows_ = 0, nulls_ = 0;
};

template <class T>
class Numbers : public Column {
 public:
  Numbers(std::vector<Column*>& table, const char* named) : Column(table, named, kType) {}
  void push(T value) {
    values_.push_back(value);
    mark(true);
  }
  void push(std::optional<T> value) {
    values_.push_back(value.value_or(0));
    mark(value.has_value());
  }

 private:
  static constexpr const char* kType = std::is_floating_point_v<T> ? "double" : sizeof(T) == 8 ? "int64" : "int32";
  void take_values(Taken& to) override {
    const std::size_t n = values_.size();
    to.buffers.push_back(Buffer::of(std::exchange(values_, {})));
    values_.reserve(n);
  }
  std::vector<T> values_;
};

using Int64 = Numbers<std::int64_t>;
using Int32 = Numbers<std::int32_t>;
using Double = Numbers<double>;

class Flags : public Column {
 public:
  Flags(std::vector<Column*>& table, const char* named) : Column(table, named, "bool") {}
  void push(std::optional<bool> value) {
    values_.push(value.value_or(false));
    mark(value.has_value());
  }

 private:
  void take_values(Taken& to) override { to.buffers.push_back(values_.take()); }
  Bits values_;
};

// The labels of a run, numbered as they come up.
using Word = std::int32_t;
inline constexpr Word kNoWord = -1;

class Words {
 public:
  Word of(Label label);
  Word of(std::string_view text) { return of(label(text)); }
  const std::string& text(Word word) const { return *labels_[static_cast<std::size_t>(word)]; }

 private:
  std::vector<Label> labels_;
  std::unordered_map<Label, Word> words_;
};

class Labels : public Column {
 public:
  Labels(std::vector<Column*>& table, const char* named, const Words& words)
      : Column(table, named, "dictionary<values=string, indices=int32, ordered=0>"), words_(words) {}
  void push(Word word) {
    codes_.push_back(word == kNoWord ? 0 : code(static_cast<std::size_t>(word)));
    mark(word != kNoWord);
  }

 private:
  std::int32_t code(std::size_t word);
  void take_values(Taken& to) override;

  const Words& words_;
  std::vector<std::int32_t> codes_;
  std::vector<Word> dictionary_;       // in order of appearance since the last take
  std::vector<std::int32_t> code_of_;  // by word; -1: not in the dictionary
};

class Binary : public Column {
 public:
  Binary(std::vector<Column*>& table, const char* named) : Column(table, named, "binary") {}
  void push(std::string_view value);  // throws std::length_error beyond 2 GiB
  std::size_t bytes() const { return bytes_.size(); }

 private:
  void take_values(Taken& to) override;
  std::vector<std::int32_t> offsets_{0};
  std::vector<char> bytes_;
};

template <class T>
class FixedBinary : public Column {
  static_assert(sizeof(T) == 16);

 public:
  FixedBinary(std::vector<Column*>& table, const char* named) : Column(table, named, "fixed_size_binary[16]") {}
  void push(const T& value) {
    values_.push_back(value);
    mark(true);
  }

 private:
  void take_values(Taken& to) override { to.buffers.push_back(Buffer::of(std::exchange(values_, {}))); }
  std::vector<T> values_;
};

// A table is a struct derived from this, whose members are its columns in their order.
struct Table {
  explicit Table(const Words& vocabulary) : words(vocabulary) {}
  const Words& words;
  std::vector<Column*> columns;
  std::int64_t rows() const { return columns.front()->rows(); }
};

}  // namespace sage::columns
