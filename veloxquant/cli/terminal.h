// What commands show a person.
#pragma once

#include "veloxquant/core/progress.h"
#include "veloxquant/core/text_table.h"

namespace veloxquant::cli {

/// A call-back that draws one line of progress with the time left on stderr, where that is a terminal, and throws Interrupted after
/// the user pressed Ctrl-C.
ProgressCallback terminal_progress();

/// Wipes the line that terminal_progress drew, if any.
void clear_progress();

/// Makes Ctrl-C stop at the next progress report; a second one ends the process at once.
void install_interrupt_handler();

/// Sends warnings of the library to stderr.
void install_warning_handler();

}  // namespace veloxquant::cli
