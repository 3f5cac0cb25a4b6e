// A streamed answer on its way through: reads of the engine's socket that can be passed on to the client as they are.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string_view>

namespace py = pybind11;

namespace sage {
namespace {

constexpr std::string_view kEventEnd = "\n\n";
constexpr std::string_view kLineEnd = "\r\n";

// The size line of a chunk, as an engine writes it: hexadecimal digits and the end of the line. Nothing else is taken,
// though HTTP/1.1 allows more.
struct SizeLine {
  std::size_t size = 0;
  std::size_t length = 0;  // of the line
};

int hex(char digit) {
  if (digit >= '0' && digit <= '9') return digit - '0';
  if (digit >= 'a' && digit <= 'f') return digit - 'a' + 10;
  if (digit >= 'A' && digit <= 'F') return digit - 'A' + 10;
  return -1;
}

constexpr std::size_t kDigitsMax = 7;

std::optional<SizeLine> size_line(std::string_view bytes) {
  SizeLine line;
  for (; line.length < bytes.size() && line.length <= kDigitsMax; ++line.length) {
    const int digit = hex(bytes[line.length]);
    if (digit < 0) break;
    line.size = line.size * 16 + static_cast<std::size_t>(digit);
  }
  if (line.length == 0 || line.length > kDigitsMax || bytes.substr(line.length, 2) != kLineEnd) return std::nullopt;
  line.length += 2;
  return line;
}

// Whether somebody on the way has to see these events: they are not only tokens, or their lines end the other way.
bool matters(std::string_view events) {
  const auto holds = [&](std::string_view text) { return events.find(text) != std::string_view::npos; };
  if (holds("\r") || holds("[DONE]") || holds("data: {\"error\"")) return true;
  constexpr std::string_view kUsage = "\"usage\"";
  for (auto at = events.find(kUsage); at != std::string_view::npos; at = events.find(kUsage, at + 1)) {
    auto value = events.substr(at + kUsage.size());  // null in every event but the last, where an engine says it at all
    const auto skip_blanks = [&] { value.remove_prefix(std::min(value.find_first_not_of(' '), value.size())); };
    skip_blanks();
    if (!value.starts_with(':')) return true;
    value.remove_prefix(1);
    skip_blanks();
    if (!value.starts_with("null")) return true;
  }
  return false;
}

// Where in the framing of a chunked body its bytes so far have ended.
class Framing {
 public:
  // Between two chunks, and between two events of their content.
  bool between() const { return !lost_ && where_ == Where::kDigits && digits_ == 0 && at_event_; }
  bool lost() const { return lost_; }
  void lose() { lost_ = true; }

  void follow(std::string_view bytes) {
    while (!bytes.empty() && !lost_) {
      if (where_ == Where::kContent) {
        const auto content = bytes.substr(0, left_);
        note_end(content);
        left_ -= content.size();
        bytes.remove_prefix(content.size());
        if (left_ == 0) where_ = Where::kContentCr;
      } else {
        framing_byte(bytes.front());
        bytes.remove_prefix(1);
      }
    }
  }

 private:
  enum class Where { kDigits, kSizeLf, kContent, kContentCr, kContentLf };

  void framing_byte(char byte) {
    switch (where_) {
      case Where::kDigits:
        if (const int digit = hex(byte); digit >= 0 && ++digits_ <= kDigitsMax) {
          left_ = left_ * 16 + static_cast<std::size_t>(digit);
        } else if (byte == '\r' && digits_ > 0 && left_ > 0) {
          where_ = Where::kSizeLf;
        } else {
          lost_ = true;  // the last chunk, or what is not understood here
        }
        return;
      case Where::kSizeLf:
        expect(byte, '\n', Where::kContent);
        return;
      case Where::kContentCr:
        expect(byte, '\r', Where::kContentLf);
        return;
      case Where::kContentLf:
        expect(byte, '\n', Where::kDigits);
        digits_ = 0;
        return;
      case Where::kContent:
        return;
    }
  }

  void expect(char byte, char wanted, Where next) {
    where_ = next;
    if (byte != wanted) lost_ = true;
  }

  void note_end(std::string_view content) {
    if (content.size() >= 2) {
      at_event_ = content.ends_with(kEventEnd);
      ends_line_ = content.back() == '\n';
    } else if (content.size() == 1) {
      at_event_ = ends_line_ && content.front() == '\n';
      ends_line_ = content.front() == '\n';
    }
  }

  Where where_ = Where::kDigits;
  std::size_t digits_ = 0;
  std::size_t left_ = 0;  // of the chunk
  bool at_event_ = true;
  bool ends_line_ = false;
  bool lost_ = false;
};

class StreamRelay {
 public:
  StreamRelay(py::object write, py::object clock) : write_(std::move(write)), clock_(std::move(clock)) {}

  bool pass_on(const py::bytes& data) {
    if (framing_.lost()) return false;
    const std::string_view bytes(data);
    const std::int64_t events = framing_.between() ? whole_events(bytes) : 0;
    if (events == 0) {
      framing_.follow(bytes);
      return false;
    }
    heard_ns_ = clock_().cast<std::int64_t>();
    const py::object write = write_;  // a client that goes away within may stop this
    write(data);
    events_ += events;
    bytes_ += std::ssize(bytes);
    return true;
  }
  void follow(const py::bytes& data, std::size_t from) {
    const std::string_view bytes(data);
    framing_.follow(bytes.substr(std::min(from, bytes.size())));
  }
  void stop() {
    framing_.lose();
    write_ = py::none();  // the client's connection may hold this, and no collector would find the cycle
  }
  std::int64_t events() const { return events_; }
  std::int64_t bytes() const { return bytes_; }
  std::int64_t heard_ns() const { return heard_ns_; }

 private:
  // How many, if the bytes are whole chunks of whole events that do not matter to anybody on the way; else 0.
  std::int64_t whole_events(std::string_view bytes) {
    std::int64_t events = 0;
    while (!bytes.empty()) {
      const auto line = size_line(bytes);
      if (!line || line->size < kEventEnd.size() || bytes.size() < line->length + line->size + kLineEnd.size())
        return 0;
      const auto content = bytes.substr(line->length, line->size);
      if (!content.ends_with(kEventEnd) || bytes.substr(line->length + line->size, kLineEnd.size()) != kLineEnd)
        return 0;
      if (matters(content)) return 0;
      for (auto at = content.find(kEventEnd); at != std::string_view::npos; at = content.find(kEventEnd, at + 2))
        ++events;
      bytes.remove_prefix(line->length + line->size + kLineEnd.size());
    }
    return events;
  }

  py::object write_, clock_;
  Framing framing_;
  std::int64_t events_ = 0;
  std::int64_t bytes_ = 0;
  std::int64_t heard_ns_ = -1;
};

}  // namespace

void register_relay(py::module_& m) {
  py::class_<StreamRelay>(m, "StreamRelay",
                          "Passes reads of an engine's streamed answer on to its client without taking them apart.")
      .def(py::init<py::object, py::object>(), py::arg("write"), py::arg("clock"))
      .def("pass_on", &StreamRelay::pass_on, py::arg("data"))
      .def("follow", &StreamRelay::follow, py::arg("data"), py::arg("start"))
      .def("stop", &StreamRelay::stop)
      .def_property_readonly("events", &StreamRelay::events)
      .def_property_readonly("bytes", &StreamRelay::bytes)
      .def_property_readonly("heard_ns", &StreamRelay::heard_ns);
}

}  // namespace sage
