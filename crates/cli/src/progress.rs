//! The progress bar of `filter`.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const OF_FILES: &str = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left  {msg}";
const OF_A_STREAM: &str = "{spinner} {bytes} {bytes_per_sec} {elapsed}  {msg}";

/// A bar on standard error. Hidden if standard error is not a terminal, or if log lines or the output go to the terminal, too.
pub(crate) fn bar(total_bytes: Option<u64>, verbose: bool) -> anyhow::Result<ProgressBar> {
    let target = if verbose || std::io::stdout().is_terminal() {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    };
    let template = if total_bytes.is_some() { OF_FILES } else { OF_A_STREAM };
    Ok(ProgressBar::with_draw_target(total_bytes, target).with_style(ProgressStyle::with_template(template)?))
}
