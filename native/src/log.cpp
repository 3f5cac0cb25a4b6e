#include "sage/log.hpp"

#include <cstring>
#include <deque>
#include <limits>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "sage/errors.hpp"

namespace sage {

Label label(std::string_view text) {
  static std::deque<std::string> words;  // a deque keeps addresses
  static std::unordered_map<std::string_view, Label> known;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(text);
  if (found != known.end()) return found->second;
  words.emplace_back(text);
  known.emplace(words.back(), &words.back());
  return &words.back();
}

// --- writing ---------------------------------------------------------------------------------------------------------

namespace {

void put_be(std::string& out, std::uint64_t value, int bytes) {
  char text[8];
  for (int i = 0; i < bytes; ++i) text[i] = static_cast<char>(value >> (8 * (bytes - 1 - i)));
  out.append(text, static_cast<std::size_t>(bytes));
}

void put(std::string& out, std::int64_t value) {
  const auto bits = static_cast<std::uint64_t>(value);
  if (value >= 0) {
    if (value < 0x80) {
      out.push_back(static_cast<char>(value));
    } else if (value <= 0xff) {
      out.push_back('\xcc'), put_be(out, bits, 1);
    } else if (value <= 0xffff) {
      out.push_back('\xcd'), put_be(out, bits, 2);
    } else if (value <= 0xffffffff) {
      out.push_back('\xce'), put_be(out, bits, 4);
    } else {
      out.push_back('\xcf'), put_be(out, bits, 8);
    }
  } else if (value >= -0x20) {
    out.push_back(static_cast<char>(value));
  } else if (value >= -0x80) {
    out.push_back('\xd0'), put_be(out, bits, 1);
  } else if (value >= -0x8000) {
    out.push_back('\xd1'), put_be(out, bits, 2);
  } else if (value >= -0x80000000LL) {
    out.push_back('\xd2'), put_be(out, bits, 4);
  } else {
    out.push_back('\xd3'), put_be(out, bits, 8);
  }
}

void put(std::string& out, double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  out.push_back('\xcb'), put_be(out, bits, 8);
}

void put(std::string& out, bool value) { out.push_back(value ? '\xc3' : '\xc2'); }

void put(std::string& out, std::string_view text) {
  const std::size_t n = text.size();
  if (n < 0x20) {
    out.push_back(static_cast<char>(0xa0 | n));
  } else if (n <= 0xff) {
    out.push_back('\xd9'), put_be(out, n, 1);
  } else if (n <= 0xffff) {
    out.push_back('\xda'), put_be(out, n, 2);
  } else {
    out.push_back('\xdb'), put_be(out, n, 4);
  }
  out.append(text);
}

void put_array(std::string& out, std::size_t n) {
  if (n < 0x10) {
    out.push_back(static_cast<char>(0x90 | n));
  } else if (n <= 0xffff) {
    out.push_back('\xdc'), put_be(out, n, 2);
  } else {
    out.push_back('\xdd'), put_be(out, n, 4);
  }
}

// A tagged array: the name of the type, then its fields.
template <class... Fields>
void put_struct(std::string& out, std::string_view tag, const Fields&... fields) {
  put_array(out, 1 + sizeof...(fields));
  put(out, tag);
  (put(out, fields), ...);
}

struct PutEvent {
  std::string& out;
  void operator()(const RequestArrived& e) const {
    put_struct(out, "RequestArrived", e.request, std::string_view(*e.pipeline), e.kind, std::string_view(*e.tenant),
               e.priority, e.input_tokens, e.output_tokens_max, e.scheduled_at, e.ttft_due_at, e.due_at, e.prefix);
  }
  void operator()(const RequestCancelled& e) const { put_struct(out, "RequestCancelled", e.request); }
  void operator()(const TokensProduced& e) const { put_struct(out, "TokensProduced", e.task, e.count); }
  void operator()(const TaskFinished& e) const { put_struct(out, "TaskFinished", e.task, e.output_tokens); }
  void operator()(const TaskFailed& e) const {
    put_struct(out, "TaskFailed", e.task, std::string_view(e.reason), e.retryable);
  }
  void operator()(const ReplicaReported& e) const {
    put_struct(out, "ReplicaReported", e.replica, e.running, e.waiting, e.kv_blocks_free);
  }
  void operator()(const JoinedEvent& joined) const {
    const ReplicaJoined& e = *joined;
    put_struct(out, "ReplicaJoined", e.replica, std::string_view(e.pool), e.pool_kind, e.device,
               std::string_view(e.node), e.tasks_max, e.batch_tokens_max, e.kv_tokens_max, e.fixed_ns, e.input_token_ns,
               e.output_token_ns, e.output_seq_ns);
  }
  void operator()(const ReplicaDraining& e) const { put_struct(out, "ReplicaDraining", e.replica); }
  void operator()(const ReplicaLeft& e) const { put_struct(out, "ReplicaLeft", e.replica); }
  void operator()(const PolicyChanged& e) const { put_struct(out, "PolicyChanged", std::string_view(e.policy)); }
  void operator()(const RunEnded& e) const { put_struct(out, "RunEnded", std::string_view(e.reason)); }
};

struct PutCommand {
  std::string& out;
  void operator()(const Dispatch& c) const {
    put_array(out, 3), put(out, std::string_view("Dispatch")), put(out, c.replica);
    put_array(out, c.tasks.size());
    for (const Task& t : c.tasks) {
      put_array(out, 8);
      for (const std::int64_t field :
           {t.task, t.stage, t.attempt, t.priority, t.queued_at, t.input_tokens, t.output_tokens_max, t.prefix})
        put(out, field);
    }
  }
  void operator()(const Cancel& c) const { put_struct(out, "Cancel", c.replica, c.task); }
  void operator()(const Respond& c) const { put_struct(out, "Respond", c.request); }
  void operator()(const Reject& c) const {
    put_struct(out, "Reject", c.request, std::string_view(c.reason), c.retry_after_ns);
  }
  void operator()(const Fail& c) const { put_struct(out, "Fail", c.request, std::string_view(c.reason)); }
};

}  // namespace

void encode(const Event& event, std::string& out) { std::visit(PutEvent{out}, event); }
void encode(const Command& command, std::string& out) { std::visit(PutCommand{out}, command); }

void encode(const std::vector<Event>& events, std::string& out) {
  put_array(out, events.size());
  for (const Event& event : events) encode(event, out);
}

void encode(const std::vector<Command>& commands, std::string& out) {
  put_array(out, commands.size());
  for (const Command& command : commands) encode(command, out);
}

// --- reading ---------------------------------------------------------------------------------------------------------

namespace {

class Reader {
 public:
  explicit Reader(std::string_view bytes) : at_(bytes.data()), end_(bytes.data() + bytes.size()) {}

  std::size_t array() {
    const unsigned char head = byte();
    if ((head & 0xf0) == 0x90) return head & 0x0f;
    if (head == 0xdc) return static_cast<std::size_t>(be(2));
    if (head == 0xdd) return static_cast<std::size_t>(be(4));
    refuse("an array");
  }

  std::int64_t integer() {
    const unsigned char head = byte();
    if (head < 0x80) return head;
    if (head >= 0xe0) return static_cast<signed char>(head);
    switch (head) {
      case 0xcc:
        return static_cast<std::int64_t>(be(1));
      case 0xcd:
        return static_cast<std::int64_t>(be(2));
      case 0xce:
        return static_cast<std::int64_t>(be(4));
      case 0xcf: {
        const std::uint64_t value = be(8);
        if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) refuse("an int64");
        return static_cast<std::int64_t>(value);
      }
      case 0xd0:
        return static_cast<std::int8_t>(be(1));
      case 0xd1:
        return static_cast<std::int16_t>(be(2));
      case 0xd2:
        return static_cast<std::int32_t>(be(4));
      case 0xd3:
        return static_cast<std::int64_t>(be(8));
      default:
        refuse("a whole number");
    }
  }

  double real() {
    const auto head = static_cast<unsigned char>(at_ < end_ ? *at_ : 0);
    if (head != 0xcb) return static_cast<double>(integer());
    ++at_;
    const std::uint64_t bits = be(8);
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  bool boolean() {
    const unsigned char head = byte();
    if (head != 0xc2 && head != 0xc3) refuse("true or false");
    return head == 0xc3;
  }

  std::string_view text() {
    const unsigned char head = byte();
    std::size_t n = 0;
    if ((head & 0xe0) == 0xa0)
      n = head & 0x1f;
    else if (head == 0xd9)
      n = static_cast<std::size_t>(be(1));
    else if (head == 0xda)
      n = static_cast<std::size_t>(be(2));
    else if (head == 0xdb)
      n = static_cast<std::size_t>(be(4));
    else
      refuse("a string");
    if (static_cast<std::size_t>(end_ - at_) < n) refuse("more bytes");
    const std::string_view found(at_, n);
    at_ += n;
    return found;
  }

  bool ended() const { return at_ == end_; }

  [[noreturn]] void refuse(const char* expected) const {
    throw IllegalEvent(std::string("encoded events: expected ") + expected);
  }

 private:
  unsigned char byte() {
    if (at_ == end_) refuse("more bytes");
    return static_cast<unsigned char>(*at_++);
  }
  std::uint64_t be(int bytes) {
    std::uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) value = value << 8 | byte();
    return value;
  }

  const char* at_;
  const char* end_;
};

// Braced initialisers are evaluated left to right, so the fields are read in their order.
Event read_event(Reader& in) {
  const std::size_t n = in.array();
  const std::string_view tag = in.text();
  const auto expect = [&](std::size_t fields) {
    if (n != fields + 1) in.refuse("as many fields as the event has");
  };
  if (tag == "RequestArrived") {
    expect(11);
    return RequestArrived{in.integer(), label(in.text()), in.integer(), label(in.text()), in.integer(), in.integer(),
                          in.integer(), in.integer(),     in.integer(), in.integer(),     in.integer()};
  }
  if (tag == "TokensProduced") return expect(2), TokensProduced{in.integer(), in.integer()};
  if (tag == "TaskFinished") return expect(2), TaskFinished{in.integer(), in.integer()};
  if (tag == "ReplicaReported")
    return expect(4), ReplicaReported{in.integer(), in.integer(), in.integer(), in.integer()};
  if (tag == "RequestCancelled") return expect(1), RequestCancelled{in.integer()};
  if (tag == "TaskFailed") return expect(3), TaskFailed{in.integer(), std::string(in.text()), in.boolean()};
  if (tag == "ReplicaJoined") {
    expect(12);
    return std::make_shared<const ReplicaJoined>(
        ReplicaJoined{in.integer(), std::string(in.text()), in.integer(), in.integer(), std::string(in.text()),
                      in.integer(), in.integer(), in.integer(), in.real(), in.real(), in.real(), in.real()});
  }
  if (tag == "ReplicaDraining") return expect(1), ReplicaDraining{in.integer()};
  if (tag == "ReplicaLeft") return expect(1), ReplicaLeft{in.integer()};
  if (tag == "PolicyChanged") return expect(1), PolicyChanged{std::string(in.text())};
  if (tag == "RunEnded") return expect(1), RunEnded{std::string(in.text())};
  in.refuse("the name of an event");
}

}  // namespace

std::vector<Event> decode_events(std::string_view bytes) {
  Reader in(bytes);
  const std::size_t n = in.array();
  std::vector<Event> events;
  for (std::size_t i = 0; i < n; ++i) events.push_back(read_event(in));
  if (!in.ended()) in.refuse("nothing after the last event");
  return events;
}

// --- digest ----------------------------------------------------------------------------------------------------------

namespace {

constexpr std::uint64_t kIv[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                  0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};

constexpr std::uint8_t kSigma[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

constexpr std::uint64_t rotated(std::uint64_t x, int by) { return x >> by | x << (64 - by); }

void compress(std::uint64_t (&h)[8], const char* block, std::uint64_t counter, bool last) {
  std::uint64_t m[16], v[16];
  for (int i = 0; i < 16; ++i) {
    m[i] = 0;
    for (int byte = 7; byte >= 0; --byte) m[i] = m[i] << 8 | static_cast<unsigned char>(block[8 * i + byte]);
  }
  for (int i = 0; i < 8; ++i) v[i] = h[i], v[i + 8] = kIv[i];
  v[12] ^= counter;
  if (last) v[14] = ~v[14];
  const auto mix = [&v](int a, int b, int c, int d, std::uint64_t x, std::uint64_t y) {
    v[a] += v[b] + x, v[d] = rotated(v[d] ^ v[a], 32);
    v[c] += v[d], v[b] = rotated(v[b] ^ v[c], 24);
    v[a] += v[b] + y, v[d] = rotated(v[d] ^ v[a], 16);
    v[c] += v[d], v[b] = rotated(v[b] ^ v[c], 63);
  };
  for (int round = 0; round < 12; ++round) {
    const std::uint8_t* s = kSigma[round % 10];
    for (int i = 0; i < 4; ++i) mix(i, i + 4, i + 8, i + 12, m[s[2 * i]], m[s[2 * i + 1]]);
    for (int i = 0; i < 4; ++i)
      mix(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12, m[s[2 * i + 8]], m[s[2 * i + 9]]);
  }
  for (int i = 0; i < 8; ++i) h[i] ^= v[i] ^ v[i + 8];
}

}  // namespace

Digest blake2b_16(std::string_view data) {
  constexpr std::size_t kBlock = 128;
  std::uint64_t h[8];
  std::memcpy(h, kIv, sizeof h);
  h[0] ^= 0x01010000 ^ sizeof(Digest);  // fan-out 1, depth 1, no key, 16 bytes
  std::size_t done = 0;
  for (; data.size() - done > kBlock; done += kBlock) compress(h, data.data() + done, done + kBlock, false);
  char rest[kBlock] = {};
  std::memcpy(rest, data.data() + done, data.size() - done);
  compress(h, rest, data.size(), true);
  Digest digest;
  for (std::size_t i = 0; i < digest.size(); ++i) digest[i] = static_cast<char>(h[i / 8] >> (8 * (i % 8)));
  return digest;
}

const Digest& Chain::step(std::int64_t now, std::string_view encoded, const std::vector<Command>& commands) {
  scratch_.assign(digest_.data(), digest_.size());
  for (int byte = 0; byte < 8; ++byte)
    scratch_.push_back(static_cast<char>(static_cast<std::uint64_t>(now) >> 8 * byte));
  scratch_.append(encoded);
  encode(commands, scratch_);
  digest_ = blake2b_16(scratch_);
  return digest_;
}

}  // namespace sage
