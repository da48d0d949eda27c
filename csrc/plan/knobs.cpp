#include "knobs.h"

#include <charconv>
#include <cstdlib>

#include "plan_error.h"

namespace leanattn {

std::string_view knob(const char* variable) {
  const char* text = std::getenv(variable);
  return text ? text : "";
}

int knob_number(const char* variable, std::string_view text) {
  int number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || end != text.data() + text.size() || number < 1 || number > 65536) {
    throw PlanError(variable, "must hold a number from 1 to 65536, got '", text, "'");
  }
  return number;
}

bool knob_is_second(const char* variable, std::string_view first, std::string_view second) {
  const std::string_view text = knob(variable);
  if (text.empty() || text == first) return false;
  if (text == second) return true;
  throw PlanError(variable, "must be '", first, "' or '", second, "', got '", text, "'");
}

}  // namespace leanattn
