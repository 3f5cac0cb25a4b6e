// A load generator that costs little beside what it measures. It checks every answer of fake_backend (status, whole
// body, the number of events, the vector that belongs to the input) and prints one line of JSON.
//
//   http_load --port P [--kind chat|stream|embed] [--connections 1] [--rate 0] [--warmup-s 0.2] [--seconds 1]
//             [--events 33] [--model fake]
//
// Closed loop: each connection sends its next request when the last is answered. With --rate, open loop: requests begin
// on schedule whatever the answers do, each on a connection that is free or a new one, and latency counts from the
// scheduled instant. Requests that begin in the warm-up are checked and not measured.
//
// --events: data events of a stream before [DONE].
//
// JSON: n (measured), total, failures, reasons, rps, p50_us, p99_us, max_us, mean_us; streams also ttft_p50_us and
// ttft_p99_us (until the first event); open loop also lag_p99_us (sent after the scheduled instant).
#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <vector>

#include "wire.hpp"

namespace {

constexpr std::int64_t kPatienceNs = 5'000'000'000;  // for answers after the last request began
constexpr std::int64_t kFailuresMax = 100;           // then it gives up: there is nothing to measure

enum class Kind { kChat, kStream, kEmbed };

struct Settings {
  int port;
  Kind kind;
  int connections;
  double rate;
  double warmup_s;
  double seconds;
  int events;
  std::string model;
};

// One connection: what it asks, and how far the answer is.
struct Client {
  int fd = -1;
  std::string request;
  float expected = 0;  // an embedding's first element
  wire::Reader in{true};
  bool busy = false;
  std::int64_t begun = 0;
  std::int64_t first = 0;   // instant of the first event; 0: none yet
  std::size_t scanned = 0;  // of the body, for events
  int events = 0;
  bool done = false;  // [DONE] came
};

std::string request(Kind kind, const std::string& model, const std::string& input) {
  std::string path = "/v1/chat/completions";
  std::string body;
  if (kind == Kind::kEmbed) {
    path = "/v1/embeddings";
    body = R"({"model":")" + model + R"(","input":)" + input + R"(,"encoding_format":"float"})";
  } else {
    body =
        R"({"model":")" + model +
        R"(","messages":[{"role":"system","content":"You are a careful assistant. Answer in one )"
        R"(paragraph, name your sources, and say so when you do not know."},{"role":"user","content":"We serve a mix )"
        R"(of chat, batch generation and embeddings on eight engines. Queues grow at noon and the engines with the )"
        R"(longest prompts fall behind the others. Which signal should a router use to choose between them, and how )"
        R"(stale may it be before the choice does harm?"}],"max_tokens":128,"temperature":0.7)";
    body += kind == Kind::kStream ? R"(,"stream":true,"stream_options":{"include_usage":true}})" : "}";
  }
  return "POST " + path +
         " HTTP/1.1\r\nhost: 127.0.0.1\r\nuser-agent: http_load\r\naccept: */*\r\ncontent-type: application/json\r\n" +
         "authorization: Bearer sk-local\r\ncontent-length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

class Load {
 public:
  explicit Load(const Settings& settings) : settings_(settings), epoll_(epoll_create1(0)) {
    wire::watch(epoll_, alarm_.fd, EPOLLIN);
    // Room for what a fast loopback answers, so that the vectors do not grow while it is measured.
    latencies_.reserve(1 << 20);
    firsts_.reserve(1 << 20);
  }

  void run() {
    measured_from_ = wire::now_ns() + static_cast<std::int64_t>(settings_.warmup_s * 1e9);
    end_ = measured_from_ + static_cast<std::int64_t>(settings_.seconds * 1e9);
    schedule_from_ = wire::now_ns();
    if (settings_.rate > 0)
      send_due();
    else
      for (int i = 0; i < settings_.connections; ++i) begin(fresh(), wire::now_ns());
    epoll_event events[256];
    while (failures_ < kFailuresMax && (busy_ > 0 || scheduled() < end_)) {
      const auto now = wire::now_ns();
      if (now > end_ + kPatienceNs) break;
      const int ready = epoll_wait(epoll_, events, 256, 100);
      for (int i = 0; i < ready; ++i) {
        if (events[i].data.fd == alarm_.fd)
          send_due();
        else
          turn(*by_fd_[events[i].data.fd]);
      }
    }
    for (; busy_ > 0; --busy_) fail("no answer");
  }

  void print() {
    std::string reasons;
    for (const auto& [reason, count] : reasons_)
      reasons += (reasons.empty() ? "\"" : ",\"") + reason + "\":" + std::to_string(count);
    double sum = 0;
    for (const auto latency : latencies_) sum += static_cast<double>(latency);
    const auto n = latencies_.size();
    std::printf("{\"n\":%zu,\"total\":%lld,\"failures\":%lld,\"reasons\":{%s},\"rps\":%.1f,", n,
                static_cast<long long>(total_), static_cast<long long>(failures_), reasons.c_str(),
                static_cast<double>(n) / settings_.seconds);
    std::printf("\"p50_us\":%.2f,\"p99_us\":%.2f,\"max_us\":%.2f,\"mean_us\":%.2f", quantile_us(latencies_, 0.5),
                quantile_us(latencies_, 0.99), quantile_us(latencies_, 1),
                n == 0 ? 0 : sum / static_cast<double>(n) / 1e3);
    if (settings_.kind == Kind::kStream)
      std::printf(",\"ttft_p50_us\":%.2f,\"ttft_p99_us\":%.2f", quantile_us(firsts_, 0.5), quantile_us(firsts_, 0.99));
    if (settings_.rate > 0) std::printf(",\"lag_p99_us\":%.2f", quantile_us(lags_, 0.99));
    std::printf("}\n");
  }

 private:
  // Nearest rank.
  static double quantile_us(std::vector<std::int64_t>& samples, double q) {
    if (samples.empty()) return 0;
    const auto rank = static_cast<std::size_t>(std::ceil(q * static_cast<double>(samples.size()))) - 1;
    std::nth_element(samples.begin(), samples.begin() + static_cast<std::ptrdiff_t>(rank), samples.end());
    return static_cast<double>(samples[rank]) / 1e3;
  }

  // --- the open loop's schedule ---

  std::int64_t scheduled() const {
    if (settings_.rate <= 0) return end_;
    return schedule_from_ + static_cast<std::int64_t>(static_cast<double>(next_) * 1e9 / settings_.rate);
  }

  void send_due() {
    alarm_.clear();
    for (; scheduled() < end_; ++next_) {
      const auto now = wire::now_ns();
      if (scheduled() > now) return alarm_.set(scheduled());
      if (scheduled() >= measured_from_) lags_.push_back(now - scheduled());
      if (free_.empty()) {
        begin(fresh(), scheduled());
      } else {
        Client& client = *free_.back();
        free_.pop_back();
        begin(client, scheduled());
      }
    }
  }

  // --- connections ---

  Client& fresh() {
    clients_.push_back(std::make_unique<Client>());
    Client& client = *clients_.back();
    const std::string input =
        "\"passage " + std::to_string(clients_.size()) +
        ": a queue that is measured where it grows tells more than a count that is scraped later\"";
    client.request = request(settings_.kind, settings_.model, input);
    client.expected = wire::element(wire::vector_of(input), 0);
    connect_to(client);
    return client;
  }

  void connect_to(Client& client) {
    client.fd = socket(AF_INET, SOCK_STREAM, 0);
    const auto address = wire::loopback(settings_.port);
    if (connect(client.fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
      wire::die("connect to port " + std::to_string(settings_.port));
    wire::make_prompt(client.fd);
    client.in = wire::Reader(true);
    if (static_cast<std::size_t>(client.fd) >= by_fd_.size()) by_fd_.resize(static_cast<std::size_t>(client.fd) + 1);
    by_fd_[client.fd] = &client;
    wire::watch(epoll_, client.fd, EPOLLIN);
  }

  void again(Client& client) {
    close(client.fd);
    connect_to(client);
  }

  void begin(Client& client, std::int64_t at) {
    client.busy = true;
    ++busy_;
    ++total_;
    client.begun = at;
    client.first = 0;
    client.scanned = 0;
    client.events = 0;
    client.done = false;
    // A request is smaller than any socket's buffer, and the connection has nothing else to send.
    if (send(client.fd, client.request.data(), client.request.size(), 0) !=
        static_cast<std::int64_t>(client.request.size()))
      over(client, "could not send");
  }

  void turn(Client& client) {
    const auto got = recv(client.fd, buffer_, sizeof buffer_, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (!client.busy) {
      if (got > 0) fail("bytes without a request");
      return again(client);  // or an idle connection that the other side had enough of
    }
    if (got <= 0) return over(client, "closed");
    client.in.feed(buffer_, static_cast<std::size_t>(got));
    if (settings_.kind == Kind::kStream) scan(client);
    if (client.in.broken) return over(client, "not HTTP");
    if (client.in.complete) over(client, wrong(client));
  }

  // Counts the events that have come whole.
  void scan(Client& client) {
    const std::string_view body = client.in.body;
    for (auto end = body.find('\n', client.scanned); end != std::string_view::npos;
         end = body.find('\n', client.scanned)) {
      const auto line = body.substr(client.scanned, end - client.scanned);
      client.scanned = end + 1;
      if (line.starts_with("data: {")) {
        if (client.first == 0) client.first = wire::now_ns();
        ++client.events;
      } else if (line.starts_with("data: [DONE]")) {
        client.done = true;
      }
    }
  }

  // What is wrong with a complete answer; empty: nothing.
  std::string wrong(const Client& client) const {
    const std::string_view body = client.in.body;
    const auto status = client.in.head.substr(0, 12);
    if (status != "HTTP/1.1 200") return "status " + status.substr(std::min<std::size_t>(9, status.size()));
    switch (settings_.kind) {
      case Kind::kChat:
        return body.find(wire::kText) != std::string_view::npos && body.find("\"usage\"") != std::string_view::npos &&
                       body.ends_with('}')
                   ? ""
                   : "body";
      case Kind::kStream:
        return client.events == settings_.events && client.done ? "" : "events";
      case Kind::kEmbed: {
        const auto key = body.find("\"embedding\":");
        if (key == std::string_view::npos) return "body";
        const auto number = body.find_first_of("-0123456789", key);
        if (number == std::string_view::npos) return "body";
        return std::abs(std::strtof(body.data() + number, nullptr) - client.expected) < 1e-6f ? "" : "vector";
      }
    }
    return "kind";
  }

  void fail(const std::string& reason) {
    ++failures_;
    ++reasons_[reason];
  }

  // The request is over, well if `why` is empty; the connection goes on, or is replaced.
  void over(Client& client, const std::string& why) {
    const auto now = wire::now_ns();
    busy_ -= client.busy;
    client.busy = false;
    if (!why.empty()) {
      fail(why);
      again(client);
    } else {
      if (client.begun >= measured_from_) {
        latencies_.push_back(now - client.begun);
        if (client.first != 0) firsts_.push_back(client.first - client.begun);
      }
      client.in.last ? again(client) : client.in.next();
    }
    if (settings_.rate > 0)
      free_.push_back(&client);
    else if (now < end_ && failures_ < kFailuresMax)
      begin(client, now);
  }

  const Settings settings_;
  const int epoll_;
  const wire::Alarm alarm_;
  std::vector<std::unique_ptr<Client>> clients_;
  std::vector<Client*> by_fd_;
  std::vector<Client*> free_;  // open loop: connections without a request
  std::vector<std::int64_t> latencies_;
  std::vector<std::int64_t> firsts_;
  std::vector<std::int64_t> lags_;
  std::map<std::string, std::int64_t> reasons_;
  std::int64_t schedule_from_ = 0;
  std::int64_t measured_from_ = 0;
  std::int64_t end_ = 0;
  std::int64_t next_ = 0;
  std::int64_t total_ = 0;
  std::int64_t failures_ = 0;
  int busy_ = 0;
  char buffer_[1 << 16];
};

}  // namespace

int main(int count, char** words) {
  wire::behave();
  const auto text = [&](const char* name, const char* otherwise) {
    return wire::option(count, words, name, otherwise);
  };
  const auto number = [&](const char* name, const char* otherwise) { return std::atof(text(name, otherwise).c_str()); };
  const std::map<std::string, Kind> kinds = {{"chat", Kind::kChat}, {"stream", Kind::kStream}, {"embed", Kind::kEmbed}};
  const auto kind = kinds.find(text("--kind", "chat"));
  if (kind == kinds.end()) {
    std::fprintf(stderr, "--kind is one of chat, stream, embed\n");
    return 2;
  }
  const auto load = std::make_unique<Load>(Settings{.port = static_cast<int>(number("--port", "8000")),
                                                    .kind = kind->second,
                                                    .connections = static_cast<int>(number("--connections", "1")),
                                                    .rate = number("--rate", "0"),
                                                    .warmup_s = number("--warmup-s", "0.2"),
                                                    .seconds = number("--seconds", "1"),
                                                    .events = static_cast<int>(number("--events", "33")),
                                                    .model = text("--model", "fake")});
  load->run();
  load->print();
}
