// What commands show a person.
#pragma once

#include "veloxquant/core/progress.h"
#include "veloxquant/core/text_table.h"

namespace veloxquant::cli {

inline constexpr int kInterruptedStatus = 130;  // of the process: as shells have it, 128 and the signal's number

/// A call-back that draws one line of progress with the time left on stderr, where that is a terminal, and throws Interrupted after
/// the user pressed Ctrl-C.
ProgressCallback terminal_progress();

/// Throws Interrupted after the user pressed Ctrl-C: for work that shows what it does in another way.
void check_interrupt();

/// Wipes the line that terminal_progress drew, if any.
void clear_progress();

/// Makes Ctrl-C stop at the next progress report; a second one ends the process at once.
void install_interrupt_handler();

/// From here on Ctrl-C ends the process half a second later where no report has come by then, in the middle of a long step: for
/// commands that write no file.
void end_soon_at_interrupt();

/// Sends warnings of the library to stderr.
void install_warning_handler();

}  // namespace veloxquant::cli
