// What cannot be planned as it was asked for. It names the argument or the environment variable alone:
// which op was called the binding knows, and says.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace leanattn {

class PlanError : public std::runtime_error {
 public:
  // `text` goes after the argument's name: "must be ..., got ...".
  template <class... Text>
  explicit PlanError(const char* argument, const Text&... text)
      : PlanError(argument, words(text...)) {}

  const char* argument() const { return argument_; }
  const char* text() const { return text_.c_str(); }

 private:
  PlanError(const char* argument, const std::string& text)
      : std::runtime_error(std::string("leanattn: ") + argument + ' ' + text),
        argument_(argument),
        text_(text) {}

  template <class... Text>
  static std::string words(const Text&... text) {
    std::ostringstream words;
    (words << ... << text);
    return words.str();
  }

  const char* argument_;
  std::string text_;
};

}  // namespace leanattn
