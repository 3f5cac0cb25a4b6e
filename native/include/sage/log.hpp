// The log of a run: MessagePack of events and commands as msgspec writes it, and the digest that chains the steps. The
// twin of sage_core/log.py: the same bytes, so a log does not tell who wrote it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "sage/words.hpp"

namespace sage {

void encode(const Event& event, std::string& out);
void encode(const Command& command, std::string& out);
void encode(const std::vector<Event>& events, std::string& out);
void encode(const std::vector<Command>& commands, std::string& out);

// Throws IllegalEvent for bytes that no events encode to.
std::vector<Event> decode_events(std::string_view bytes);

using Digest = std::array<char, 16>;

Digest blake2b_16(std::string_view data);  // BLAKE2b with a digest of 16 bytes, no key (RFC 7693)

class Chain {
 public:
  // Advances the chain by one step; `encoded` are its events.
  const Digest& step(std::int64_t now, std::string_view encoded, const std::vector<Command>& commands);
  const Digest& digest() const { return digest_; }

 private:
  Digest digest_{};
  std::string scratch_;
};

}  // namespace sage
