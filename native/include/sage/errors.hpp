// Blame in the type, as in sage_core/errors.py; module.cpp turns each into its Python twin.
#pragma once

#include <stdexcept>

namespace sage {

struct PolicyError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct IllegalEvent : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct InvariantViolation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace sage
