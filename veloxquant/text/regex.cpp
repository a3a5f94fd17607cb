#include "veloxquant/text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <limits>
#include <new>

#include "veloxquant/core/error.h"
#include "veloxquant/text/regex_syntax.h"
#include "veloxquant/text/unicode.h"

namespace veloxquant {
namespace {

template <auto kFree>
struct Free {
  template <class T>
  void operator()(T* object) const {
    kFree(object);
  }
};
using CompileContext = std::unique_ptr<pcre2_compile_context, Free<pcre2_compile_context_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Free<pcre2_match_context_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Free<pcre2_match_data_free>>;
using JitStack = std::unique_ptr<pcre2_jit_stack, Free<pcre2_jit_stack_free>>;

// Groups that repeat over a megabyte keep a frame for every turn.
constexpr std::size_t kJitStackStart = 64 << 10, kJitStackMax = 64 << 20;
constexpr std::uint32_t kHeapLimitKib = 1 << 20;

// Steps back that a match may take: what an ordinary pattern takes over a run of one kind of character, and far from forever.
std::uint32_t match_limit(std::size_t text_size) {
  return static_cast<std::uint32_t>(
      std::min<std::uint64_t>(10'000'000 + 16 * std::uint64_t{text_size}, std::numeric_limits<std::uint32_t>::max()));
}

// What matching works in; one per thread, since making a stack for every word would take longer than matching it.
struct Workspace {
  MatchData data{pcre2_match_data_create(1, nullptr)};
  MatchContext context{pcre2_match_context_create(nullptr)};
  JitStack stack{pcre2_jit_stack_create(kJitStackStart, kJitStackMax, nullptr)};

  Workspace() {
    if (!data || !context || !stack) throw std::bad_alloc();
    pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
    pcre2_set_heap_limit(context.get(), kHeapLimitKib);
  }
};

Workspace& workspace() {
  static thread_local Workspace instance;
  return instance;
}

PCRE2_SPTR code_units(std::string_view text) {
  return reinterpret_cast<PCRE2_SPTR>(text.data() ? text.data() : "");
}

std::string message_of(int error) {
  PCRE2_UCHAR buffer[256] = {};
  pcre2_get_error_message(error, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

}  // namespace

struct Regex::Compiled {
  std::unique_ptr<pcre2_code, Free<pcre2_code_free>> code;
  std::string pattern;

  // As pcre2_match; where compiled code runs out of stack, once more by the interpreter, which takes the heap.
  int match(std::string_view text, std::size_t from, Workspace& work) const {
    const int found =
        pcre2_match(code.get(), code_units(text), text.size(), from, PCRE2_NO_UTF_CHECK, work.data.get(), work.context.get());
    if (found != PCRE2_ERROR_JIT_STACKLIMIT) return found;
    return pcre2_match(code.get(), code_units(text), text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, work.data.get(),
                       work.context.get());
  }
};

Regex::Regex(std::string_view pattern, std::string_view where) {
  const std::string translated = to_pcre2(pattern, where);
  const CompileContext context(pcre2_compile_context_create(nullptr));
  if (!context) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_bsr(context.get(), PCRE2_BSR_UNICODE);
  int error = 0;
  PCRE2_SIZE at = 0;
  auto compiled = std::make_shared<Compiled>();
  compiled->pattern = pattern;
  compiled->code.reset(pcre2_compile(code_units(translated), translated.size(),
                                     PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_UTF_CHECK, &error, &at, context.get()));
  if (!compiled->code) throw_failure("tokenizer", "{}: pattern \"{}\": {}", where, excerpt(pattern), message_of(error));
  pcre2_jit_compile(compiled->code.get(), PCRE2_JIT_COMPLETE);  // where there is no JIT, matching interprets
  compiled_ = std::move(compiled);
}

std::vector<Match> Regex::find_all(std::string_view text) const {
  Workspace& work = workspace();
  pcre2_set_match_limit(work.context.get(), match_limit(text.size()));
  std::vector<Match> matches;
  for (std::size_t from = 0; from <= text.size();) {
    const int found = compiled_->match(text, from, work);
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0)
      throw_failure("tokenizer", "pattern \"{}\" on a text of {} bytes: {}", excerpt(compiled_->pattern), text.size(),
                    message_of(found));
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(work.data.get());
    const Match match{range[0], range[1]};
    const bool counts = match.begin < match.end || matches.empty() || matches.back().end != match.end;
    if (counts) {
      matches.push_back(match);
      from = match.end;
    } else if (from < text.size()) {
      next_character(text, from);
    } else {
      break;
    }
  }
  return matches;
}

Regex read_pattern(const JsonObject& part) {
  const JsonObject pattern = part.object("pattern");
  const bool literal = pattern.has("String");
  if (!literal && !pattern.has("Regex")) part.refuse("pattern", "an object with Regex or String");
  return {literal ? escape_regex(pattern.string("String")) : pattern.string("Regex"), part.where()};
}

}  // namespace veloxquant
