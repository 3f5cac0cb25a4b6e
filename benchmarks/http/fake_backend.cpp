// A fake engine that costs next to nothing: OpenAI's chat, completions and embeddings over HTTP/1.1, answered at once
// from prepared text. One thread, epoll, keep-alive. What a gateway adds can be measured against it.
//
//   fake_backend [--port 0] [--pace-ms 0] [--chunks 31]
//
// Prints "listening PORT". --port 0 takes a free one. --chunks: content deltas of a stream; a role delta goes before
// them and a finish with the usage after them, then [DONE], each event in a write of its own.
//
// --pace-ms: time between events, 0 for back to back. As in an engine, whose every iteration gives each running request
// a token, all streams get their next event at the same tick; the first event never waits. POST /pace?ms=5&chunks=31
// changes both for streams that begin later (a gateway may drop headers and fields that it does not know, so a request
// cannot say it).
//
// An embedding input (a string, or an array of tokens) always gets the same one of 64 vectors, see wire.hpp.
//
// GET /stats: {"requests", "streams", "aborted", "open"}: aborted counts streams whose reader went away before the end.
#include <algorithm>
#include <map>
#include <memory>
#include <queue>
#include <vector>

#include "wire.hpp"

namespace {

using wire::Reader;
using wire::Writer;

// --- prepared answers ----------------------------------------------------------------------------------------------

std::string response(int status, std::string_view body, std::string_view type = "application/json") {
  std::string text = "HTTP/1.1 " + std::to_string(status) + (status == 200 ? " OK" : " Not Found");
  text += "\r\ncontent-type: " + std::string(type) + "\r\ncontent-length: " + std::to_string(body.size()) + "\r\n\r\n";
  return text.append(body);
}

std::string chunk(std::string_view data) {
  char size[24];
  std::snprintf(size, sizeof size, "%zx\r\n", data.size());
  return std::string(size) + std::string(data) + "\r\n";
}

constexpr std::string_view kUsage = R"("usage":{"prompt_tokens":96,"total_tokens":127,"completion_tokens":31})";

// How an endpoint that generates text answers: whole, and as the events of a stream.
struct Answer {
  std::string whole;
  std::vector<std::string> events;
};

struct Answers {
  Answer chat;
  Answer completion;
};

Answer make_answer(bool chat, int chunks) {
  const std::string text(wire::kText);
  const std::string id = chat ? R"({"id":"chatcmpl-7f3a9c0d2b4e46d8a1c5","object":"chat.completion)"
                              : R"({"id":"cmpl-7f3a9c0d2b4e46d8a1c5","object":"text_completion)";
  const std::string of = R"(","created":1750000000,"model":"fake","choices":[)";
  const auto delta = [&](const std::string& content, bool role, bool finish) {
    std::string choice = R"({"index":0,)";
    if (chat)
      choice += R"("delta":{)" + std::string(role ? R"("role":"assistant",)" : "") + R"("content":")" + content + "\"}";
    else
      choice += R"("text":")" + content + "\"";
    choice += std::string(R"(,"logprobs":null,"finish_reason":)") + (finish ? "\"stop\"" : "null") + "}]";
    if (finish) choice += "," + std::string(kUsage);
    return chunk("data: " + id + (chat ? ".chunk" : "") + of + choice + "}\n\n");
  };
  Answer answer;
  std::string whole = id + of + R"({"index":0,)";
  whole += chat ? R"("message":{"role":"assistant","content":")" + text + R"(","tool_calls":[]})"
                : R"("text":")" + text + "\"";
  answer.whole = response(200, whole + R"(,"logprobs":null,"finish_reason":"stop"}],)" + std::string(kUsage) + "}");
  answer.events.push_back(
      "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n" +
      delta("", true, false));
  for (int i = 0; i < chunks; ++i) answer.events.push_back(delta(" word" + std::to_string(i), false, false));
  answer.events.push_back(delta("", false, true));
  answer.events.push_back(chunk("data: [DONE]\n\n") + "0\r\n\r\n");
  return answer;
}

std::string base64(const unsigned char* data, std::size_t size) {
  constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < size; i += 3) {  // 384 floats: a multiple of three bytes, so there is no padding
    const unsigned bits = data[i] << 16 | data[i + 1] << 8 | data[i + 2];
    for (int shift = 18; shift >= 0; shift -= 6) text += kDigits[bits >> shift & 63];
  }
  return text;
}

// The 64 vectors as JSON values: an array of numbers, or a string of base64.
std::vector<std::string> make_vectors(bool encoded) {
  std::vector<std::string> all;
  for (std::uint64_t vector = 0; vector < wire::kVectors; ++vector) {
    float values[wire::kDimensions];
    std::string text = "[";
    for (int i = 0; i < wire::kDimensions; ++i) {
      values[i] = wire::element(vector, i);
      char digits[32];
      std::snprintf(digits, sizeof digits, "%.9g", static_cast<double>(values[i]));
      text += (i == 0 ? "" : ",") + std::string(digits);
    }
    text += "]";
    all.push_back(encoded ? "\"" + base64(reinterpret_cast<unsigned char*>(values), sizeof values) + "\"" : text);
  }
  return all;
}

// --- what a request asks -------------------------------------------------------------------------------------------

struct Asked {
  bool stream = false;
  bool encoded = false;                  // "encoding_format": "base64"
  std::vector<std::string_view> inputs;  // of "input": the bytes of each string, or of each array of tokens
};

// Reads the three top-level members that matter from well-formed JSON. Text inside of strings cannot mislead it.
class Scanner {
 public:
  explicit Scanner(std::string_view text) : text_(text) {}

  Asked scan() {
    Asked asked;
    if (!eat('{')) return asked;
    while (peek() == '"') {
      const auto key = value();
      eat(':');
      if (key == "\"input\"") {
        inputs(asked.inputs);
      } else {
        const auto held = value();
        if (key == "\"stream\"") asked.stream = held == "true";
        if (key == "\"encoding_format\"") asked.encoded = held == "\"base64\"";
      }
      eat(',');
    }
    return asked;
  }

 private:
  char peek() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
      ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool eat(char wanted) {
    const bool there = peek() == wanted;
    at_ += there;
    return there;
  }

  // Any value, as its bytes: with quotes or brackets, without the space around it.
  std::string_view value() {
    peek();
    const auto start = at_;
    int depth = 0;
    for (bool quoted = false; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (quoted) {
        if (c == '\\')
          ++at_;
        else if (c == '"')
          quoted = false;
      } else if (c == '"') {
        quoted = true;
      } else if (c == '{' || c == '[') {
        ++depth;
      } else if (depth == 0 && (c == ',' || c == '}' || c == ']' || c == ':')) {
        break;
      } else if (c == '}' || c == ']') {
        --depth;
      }
    }
    auto found = text_.substr(start, std::min(at_, text_.size()) - start);
    while (!found.empty() && std::string_view(" \n\r\t").find(found.back()) != std::string_view::npos)
      found.remove_suffix(1);
    return found;
  }

  void inputs(std::vector<std::string_view>& found) {
    const auto start = at_;
    if (!eat('[')) return found.push_back(value());
    if (const char first = peek(); first != '"' && first != '[') {  // the tokens of one input
      at_ = start;
      return found.push_back(value());
    }
    do found.push_back(value());
    while (eat(','));
    eat(']');
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

// --- the server ----------------------------------------------------------------------------------------------------

struct Connection {
  Connection(int descriptor, std::uint64_t number) : fd(descriptor), serial(number) {}
  int fd;
  std::uint64_t serial;  // tells a connection from a later one with the same descriptor
  Reader in{false};
  Writer out;
  const Answer* answer = nullptr;  // the stream in progress
  std::size_t sent = 0;            // events of it that have gone
  std::int64_t pace_ns = 0;
};

// When a paced stream sends its next event.
struct Due {
  std::int64_t at;
  int fd;
  std::uint64_t serial;
  bool operator>(const Due& other) const { return at > other.at; }
};

class Server {
 public:
  Server(int port, double pace_ms, int chunks)
      : epoll_(epoll_create1(0)),
        listener_(socket(AF_INET, SOCK_STREAM, 0)),
        pace_ns_(static_cast<std::int64_t>(pace_ms * 1e6)),
        chunks_(chunks),
        answers_(&answers_of(chunks)),
        vectors_{make_vectors(false), make_vectors(true)} {
    const int on = 1;
    setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    auto address = wire::loopback(port);
    if (bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 || listen(listener_, 4096) != 0)
      wire::die("port " + std::to_string(port));
    socklen_t size = sizeof address;
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
    fcntl(listener_, F_SETFL, O_NONBLOCK);
    wire::watch(epoll_, listener_, EPOLLIN);
    wire::watch(epoll_, alarm_.fd, EPOLLIN);
    std::printf("listening %d\n", ntohs(address.sin_port));
    std::fflush(stdout);
  }

  [[noreturn]] void serve() {
    epoll_event events[256];
    while (true) {
      const int ready = epoll_wait(epoll_, events, 256, -1);
      for (int i = 0; i < ready; ++i) {
        const int fd = events[i].data.fd;
        if (fd == listener_)
          accept_all();
        else if (fd == alarm_.fd)
          tick();
        else if (Connection* connection = find(fd))
          if (!turn(*connection, events[i].events)) drop(*connection);
      }
    }
  }

 private:
  Connection* find(int fd) { return static_cast<std::size_t>(fd) < open_.size() ? open_[fd].get() : nullptr; }

  void accept_all() {
    for (int fd; (fd = accept(listener_, nullptr, nullptr)) >= 0;) {
      wire::make_prompt(fd);
      if (static_cast<std::size_t>(fd) >= open_.size()) open_.resize(static_cast<std::size_t>(fd) + 1);
      open_[fd] = std::make_unique<Connection>(fd, ++serials_);
      wire::watch(epoll_, fd, EPOLLIN);
    }
  }

  void drop(Connection& connection) {
    if (connection.answer != nullptr || connection.out.waiting()) ++aborted_;
    close(connection.fd);
    open_[connection.fd].reset();
  }

  // False: the connection is over.
  bool turn(Connection& connection, std::uint32_t events) {
    if ((events & EPOLLOUT) != 0) {
      if (!connection.out.flush(connection.fd)) return false;
      if (!connection.out.waiting()) wire::watch(epoll_, connection.fd, EPOLLIN, EPOLL_CTL_MOD);
    }
    if ((events & ~static_cast<std::uint32_t>(EPOLLOUT)) == 0) return true;
    const auto got = recv(connection.fd, buffer_, sizeof buffer_, 0);
    if (got < 0) return errno == EAGAIN;
    if (got == 0) return false;
    connection.in.feed(buffer_, static_cast<std::size_t>(got));
    return answer_all(connection);
  }

  // Answers every request that is here, in order: one that came during a stream waits for its end.
  bool answer_all(Connection& connection) {
    while (connection.in.complete && connection.answer == nullptr) {
      if (!answer(connection)) return false;
      connection.in.next();
    }
    return !connection.in.broken;
  }

  bool put(Connection& connection, std::string_view data) {
    const bool waited = connection.out.waiting();
    if (!connection.out.write(connection.fd, data)) return false;
    if (!waited && connection.out.waiting()) wire::watch(epoll_, connection.fd, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
    return true;
  }

  bool answer(Connection& connection) {
    const std::string_view head = connection.in.head;
    const auto start = head.find(' ') + 1;
    const auto target = head.substr(start, head.find(' ', start) - start);
    const auto path = target.substr(0, target.find('?'));
    if (path == "/v1/chat/completions") return generate(connection, answers_->chat);
    if (path == "/v1/completions") return generate(connection, answers_->completion);
    if (path == "/v1/embeddings") return embed(connection);
    if (path == "/pace") {
      const auto value = [&](std::string_view name, double otherwise) {
        const auto at = target.find(name);
        return at == std::string_view::npos ? otherwise : std::atof(&target[at + name.size()]);
      };
      pace_ns_ = static_cast<std::int64_t>(1e6 * value("ms=", 0));
      answers_ = &answers_of(static_cast<int>(value("chunks=", chunks_)));
      return put(connection, response(200, "{}"));
    }
    return put(connection, manage(path));
  }

  // What a router asks before and beside the requests.
  std::string manage(std::string_view path) {
    if (path == "/health" || path == "/ping") return response(200, "");
    if (path == "/version") return response(200, R"({"version":"0.32.0"})");
    if (path == "/v1/models") {
      const auto card = [](const std::string& id) {
        return R"({"id":")" + id + R"(","object":"model","created":1750000000,"owned_by":"fake","root":")" + id +
               R"(","parent":null,"max_model_len":32768})";
      };
      return response(200, R"({"object":"list","data":[)" + card("fake") + "," + card("fake-embed") + "]}");
    }
    if (path == "/get_model_info" || path == "/model_info")
      return response(200, R"({"model_path":"fake","tokenizer_path":"fake","is_generation":true})");
    if (path == "/get_server_info" || path == "/server_info")
      return response(200, R"({"model_path":"fake","served_model_name":"fake","max_num_reqs":4096})");
    const auto open = std::count_if(open_.begin(), open_.end(), [](const auto& held) { return held != nullptr; });
    if (path == "/metrics") {
      const auto running =
          std::count_if(open_.begin(), open_.end(), [](const auto& held) { return held && held->answer != nullptr; });
      const std::string label = R"({engine="0",model_name="fake"} )";
      return response(200,
                      "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running" + label +
                          std::to_string(running) +
                          "\n# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting" + label +
                          "0\n# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc" + label + "0.0\n",
                      "text/plain; version=0.0.4");
    }
    if (path == "/stats")
      return response(200, "{\"requests\":" + std::to_string(requests_) + ",\"streams\":" + std::to_string(streams_) +
                               ",\"aborted\":" + std::to_string(aborted_) + ",\"open\":" + std::to_string(open) + "}");
    return response(404, R"({"error":{"message":"no such path","type":"NotFoundError","param":null,"code":404}})");
  }

  const Answers& answers_of(int chunks) {
    const auto [at, fresh] = made_.try_emplace(chunks);
    if (fresh) at->second = {make_answer(true, chunks), make_answer(false, chunks)};
    return at->second;
  }

  bool generate(Connection& connection, const Answer& answer) {
    ++requests_;
    if (!Scanner(connection.in.body).scan().stream) return put(connection, answer.whole);
    ++streams_;
    connection.answer = &answer;
    connection.sent = 0;
    connection.pace_ns = pace_ns_;
    if (pace_ns_ > 0) return event(connection, wire::now_ns());
    for (const auto& data : answer.events)
      if (!put(connection, data)) return false;
    connection.answer = nullptr;
    return true;
  }

  // Sends one event of a paced stream and plans the next at the next tick, from when this one was due: a late one does
  // not delay the rest.
  bool event(Connection& connection, std::int64_t due) {
    const auto& events = connection.answer->events;
    if (!put(connection, events[connection.sent++])) return false;
    if (connection.sent == events.size()) {
      connection.answer = nullptr;
      return true;
    }
    due_.push({(due / connection.pace_ns + 1) * connection.pace_ns, connection.fd, connection.serial});
    alarm_.set(due_.top().at);
    return true;
  }

  void tick() {
    alarm_.clear();
    while (!due_.empty() && due_.top().at <= wire::now_ns()) {
      const Due next = due_.top();
      due_.pop();
      Connection* connection = find(next.fd);
      if (connection == nullptr || connection->serial != next.serial) continue;
      if (!event(*connection, next.at) || !answer_all(*connection)) drop(*connection);
    }
    if (!due_.empty()) alarm_.set(due_.top().at);
  }

  bool embed(Connection& connection) {
    ++requests_;
    const auto asked = Scanner(connection.in.body).scan();
    std::string body =
        R"({"id":"embd-7f3a9c0d2b4e46d8a1c5","object":"list","created":1750000000,"model":"fake","data":[)";
    for (std::size_t i = 0; i < asked.inputs.size(); ++i) {
      body += (i == 0 ? "" : ",") + (R"({"index":)" + std::to_string(i)) + R"(,"object":"embedding","embedding":)";
      body += vectors_[asked.encoded ? 1 : 0][wire::vector_of(asked.inputs[i])];
      body += "}";
    }
    const auto tokens = std::to_string(12 * asked.inputs.size());
    body += R"(],"usage":{"prompt_tokens":)" + tokens + R"(,"total_tokens":)" + tokens + R"(,"completion_tokens":0}})";
    return put(connection, response(200, body));
  }

  const int epoll_;
  const int listener_;
  const wire::Alarm alarm_;
  std::int64_t pace_ns_;
  const int chunks_;
  std::map<int, Answers> made_;  // by content deltas; streams hold on to theirs
  const Answers* answers_;
  const std::vector<std::string> vectors_[2];  // as numbers, as base64
  std::vector<std::unique_ptr<Connection>> open_;
  std::priority_queue<Due, std::vector<Due>, std::greater<>> due_;
  std::uint64_t serials_ = 0;
  std::uint64_t requests_ = 0;
  std::uint64_t streams_ = 0;
  std::uint64_t aborted_ = 0;
  char buffer_[1 << 16];
};

}  // namespace

int main(int count, char** words) {
  wire::behave();
  const auto number = [&](const char* name, const char* otherwise) {
    return std::atof(wire::option(count, words, name, otherwise).c_str());
  };
  const auto server = std::make_unique<Server>(static_cast<int>(number("--port", "0")), number("--pace-ms", "0"),
                                               static_cast<int>(number("--chunks", "31")));
  server->serve();
}
