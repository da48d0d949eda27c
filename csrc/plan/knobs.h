// Environment variables that change how a call runs, and never what it returns; README lists them. They
// are read at every call, so that tests and tuning can set them in a running process.
#pragma once

#include <string_view>

namespace leanattn {

// The value of a variable; empty where it is not set.
std::string_view knob(const char* variable);

// The number that is all of `text`, a variable's value or the end of it. Throws PlanError for any other
// text.
int knob_number(const char* variable, std::string_view text);

// Of a variable that holds one of two words: whether it is the second. The first is the default. Throws
// PlanError for any other text.
bool knob_is_second(const char* variable, std::string_view first, std::string_view second);

}  // namespace leanattn
