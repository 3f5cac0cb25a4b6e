// What the fake engine and the load generator share: loopback sockets, a one-shot timer, HTTP/1.1 framing, and what the
// fake engine answers, so that the load generator can check it. Linux only (epoll, timerfd); one thread.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <string_view>

namespace wire {

// --- what is answered ----------------------------------------------------------------------------------------------

inline constexpr std::string_view kText =
    "A control plane decides where each request runs; the engine behind it decides how. Keeping the two apart lets one "
    "policy drive many engines.";
inline constexpr int kDimensions = 384;
inline constexpr std::uint64_t kVectors = 64;  // distinct embeddings; which one follows from the input's bytes

// Which vector an input's JSON bytes get (FNV-1a; a gateway may drop or add spaces): it keeps it however a gateway
// batches it with others.
inline std::uint64_t vector_of(std::string_view input) {
  std::uint64_t hash = 14695981039346656037ull;
  for (const char byte : input)
    if (byte != ' ') hash = (hash ^ static_cast<unsigned char>(byte)) * 1099511628211ull;
  return hash % kVectors;
}

// One element of a vector; the first tells the vectors apart.
inline float element(std::uint64_t vector, int dimension) {
  const auto step = static_cast<float>((vector * 31 + static_cast<std::uint64_t>(dimension) * 17) % 257);
  return dimension == 0 ? 0.001f * static_cast<float>(vector + 1) : (step - 128.0f) / 1867.0f;
}

// --- the system ----------------------------------------------------------------------------------------------------

[[noreturn]] inline void die(const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", what.c_str(), std::strerror(errno));
  std::exit(2);
}

inline std::int64_t now_ns() {
  timespec at{};
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec * 1'000'000'000ll + at.tv_nsec;
}

// A peer that goes away is an error code, not a signal; and nothing outlives the script that started it.
inline void behave() {
  std::signal(SIGPIPE, SIG_IGN);
  prctl(PR_SET_PDEATHSIG, SIGTERM);
}

inline sockaddr_in loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

// Without TCP_NODELAY a small write waits for the acknowledgement of the one before it: 40 ms on a keep-alive
// connection.
inline void make_prompt(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

// A one-shot alarm that epoll can wait for.
class Alarm {
 public:
  Alarm() : fd(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)) {}
  void set(std::int64_t at_ns) const {
    itimerspec when{};
    when.it_value = {.tv_sec = at_ns / 1'000'000'000, .tv_nsec = at_ns % 1'000'000'000};
    timerfd_settime(fd, TFD_TIMER_ABSTIME, &when, nullptr);
  }
  void clear() const {
    std::uint64_t times = 0;
    [[maybe_unused]] const auto got = read(fd, &times, sizeof times);
  }
  const int fd;
};

inline void watch(int epoll, int fd, std::uint32_t events, int how = EPOLL_CTL_ADD) {
  epoll_event event{.events = events, .data = {.fd = fd}};
  if (epoll_ctl(epoll, how, fd, &event) != 0) die("epoll_ctl");
}

// --- HTTP/1.1 ------------------------------------------------------------------------------------------------------

// Takes the messages of one connection off its bytes, one after another. Headers other than the framing are ignored.
class Reader {
 public:
  explicit Reader(bool responses) : responses_(responses) {}

  std::string head;       // from the first line to before the blank line
  std::string body;       // what has come of it, without chunk framing
  bool complete = false;  // the whole message is here
  bool broken = false;    // not HTTP/1.1, or a response without a length
  bool last = false;      // "connection: close"

  void feed(const char* data, std::size_t size) {
    raw_.append(data, size);
    parse();
  }

  // Forgets the message that is complete and goes on to the next, of which bytes may be here already.
  void next() {
    head.clear();
    body.clear();
    complete = last = false;
    where_ = Where::kHead;
    parse();
  }

 private:
  enum class Where { kHead, kBody, kChunkSize, kChunk, kTrailer };

  void parse() {
    while (!complete && !broken && step()) {
    }
    if (at_ == raw_.size()) {
      raw_.clear();
      at_ = 0;
    }
  }

  // One framing element. False: more bytes are needed.
  bool step() {
    switch (where_) {
      case Where::kHead:
        return read_head();
      case Where::kBody:
        return read_body();
      case Where::kChunkSize: {
        std::string_view line;
        if (!read_line(line)) return false;
        const auto parsed = std::from_chars(line.data(), line.data() + line.size(), left_, 16);
        broken = parsed.ec != std::errc{};
        where_ = left_ == 0 ? Where::kTrailer : Where::kChunk;
        return true;
      }
      case Where::kChunk:
        if (raw_.size() - at_ < left_ + 2) return false;
        body.append(raw_, at_, left_);
        at_ += left_ + 2;
        where_ = Where::kChunkSize;
        return true;
      case Where::kTrailer: {
        std::string_view line;
        if (!read_line(line)) return false;
        complete = line.empty();
        return true;
      }
    }
    return false;
  }

  bool read_line(std::string_view& line) {
    const auto end = raw_.find("\r\n", at_);
    if (end == std::string::npos) return false;
    line = std::string_view(raw_).substr(at_, end - at_);
    at_ = end + 2;
    return true;
  }

  bool read_head() {
    const auto end = raw_.find("\r\n\r\n", at_);
    if (end == std::string::npos) return false;
    head.assign(raw_, at_, end - at_);
    at_ = end + 4;
    bool chunked = false;
    bool sized = false;
    left_ = 0;
    for (std::size_t line = head.find("\r\n"); line != std::string::npos; line = head.find("\r\n", line + 2)) {
      const char* text = head.c_str() + line + 2;
      if (strncasecmp(text, "content-length:", 15) == 0) {
        left_ = std::strtoull(text + 15, nullptr, 10);
        sized = true;
      } else if (strncasecmp(text, "transfer-encoding:", 18) == 0) {
        chunked = strncasecmp(text + 18 + std::strspn(text + 18, " "), "chunked", 7) == 0;
      } else if (strncasecmp(text, "connection:", 11) == 0) {
        last = strncasecmp(text + 11 + std::strspn(text + 11, " "), "close", 5) == 0;
      }
    }
    broken = head.find("HTTP/1.1") == std::string::npos || (responses_ && !sized && !chunked);
    where_ = chunked ? Where::kChunkSize : Where::kBody;
    return true;
  }

  bool read_body() {
    const auto here = std::min(left_, raw_.size() - at_);
    body.append(raw_, at_, here);
    at_ += here;
    left_ -= here;
    complete = left_ == 0;
    return complete;
  }

  bool responses_;
  std::string raw_;
  std::size_t at_ = 0;    // first byte of raw_ that is not yet understood
  std::size_t left_ = 0;  // bytes that the body, or the chunk, still has
  Where where_ = Where::kHead;
};

// Writes to a non-blocking socket; what it does not take waits for its next turn.
class Writer {
 public:
  bool waiting() const { return at_ < pending_.size(); }

  // False: the peer is gone.
  bool write(int fd, std::string_view data) {
    if (waiting()) {
      pending_.append(data);
      return true;
    }
    const auto sent = send(fd, data.data(), data.size(), 0);
    if (sent < 0 && errno != EAGAIN) return false;
    const auto taken = sent < 0 ? 0 : static_cast<std::size_t>(sent);
    if (taken < data.size()) {
      pending_.assign(data.substr(taken));
      at_ = 0;
    }
    return true;
  }

  bool flush(int fd) {
    const auto sent = send(fd, pending_.data() + at_, pending_.size() - at_, 0);
    if (sent < 0) return errno == EAGAIN;
    at_ += static_cast<std::size_t>(sent);
    return true;
  }

 private:
  std::string pending_;
  std::size_t at_ = 0;
};

// The value of an option of the command line.
inline std::string option(int count, char** words, std::string_view name, const std::string& otherwise) {
  for (int i = 1; i + 1 < count; i += 2)
    if (words[i] == name) return words[i + 1];
  return otherwise;
}

}  // namespace wire
