// A router that looks at nothing: bytes from one socket to another. One thread, epoll, one read and one write for
// whatever is ready. Nearly all that it takes is the kernel's; a slower router may find more ready at a time, and so
// have less of that.
//
//   bare_relay --port PORT --backend PORT
//
// Each client gets a connection of its own to the engine, for as long as it keeps its own. A peer that takes no more
// bytes ends the pair: nothing is ever kept here.
#include <vector>

#include "wire.hpp"

namespace {

class Relay {
 public:
  Relay(int port, int backend) : epoll_(epoll_create1(0)), backend_(backend) {
    const int on = 1;
    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    const sockaddr_in address = wire::loopback(port);
    if (bind(listener_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) wire::die("bind");
    if (listen(listener_, 1024) != 0) wire::die("listen");
    wire::watch(epoll_, listener_, EPOLLIN);
  }

  void serve() {
    epoll_event events[256];
    for (;;) {
      const int ready = epoll_wait(epoll_, events, 256, -1);
      for (int i = 0; i < ready; ++i) {
        if (events[i].data.fd == listener_) {
          accept_all();
        } else {
          pass_on(events[i].data.fd);
        }
      }
    }
  }

 private:
  void accept_all() {
    for (int fd; (fd = accept(listener_, nullptr, nullptr)) >= 0;) {
      const int engine = socket(AF_INET, SOCK_STREAM, 0);
      const sockaddr_in address = wire::loopback(backend_);
      if (connect(engine, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) wire::die("connect");
      pair(fd, engine);
      pair(engine, fd);
    }
  }

  void pair(int fd, int other) {
    wire::make_prompt(fd);
    if (static_cast<std::size_t>(fd) >= other_.size()) other_.resize(static_cast<std::size_t>(fd) + 1, -1);
    other_[static_cast<std::size_t>(fd)] = other;
    wire::watch(epoll_, fd, EPOLLIN);
  }

  void pass_on(int fd) {
    const int other = other_[static_cast<std::size_t>(fd)];
    if (other < 0) return;  // closed earlier in this turn
    const auto got = read(fd, buffer_, sizeof buffer_);
    if (got < 0 && errno == EAGAIN) return;
    if (got > 0 && write(other, buffer_, static_cast<std::size_t>(got)) == got) return;
    for (const int each : {fd, other}) {
      other_[static_cast<std::size_t>(each)] = -1;
      close(each);
    }
  }

  const int epoll_;
  const int backend_;
  int listener_ = -1;
  std::vector<int> other_;  // by descriptor: the other end of its pair; -1: none
  char buffer_[1 << 16];
};

}  // namespace

int main(int count, char** words) {
  wire::behave();
  const auto number = [&](const char* name) { return std::atoi(wire::option(count, words, name, "0").c_str()); };
  Relay(number("--port"), number("--backend")).serve();
}
