//! The command line.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::logging::begin();
    // Refused only for signals that cannot be ignored.
    let _ = machine::host::file_signals::ignore_file_size_signal();
    let first = std::env::args_os().nth(1);
    let parsed = cli::commands::grammar(first.as_deref()).try_get_matches();
    cli::exit::Codes::choose(parsed.as_ref().ok(), std::env::args_os());
    let matches = match parsed {
        Ok(matches) => matches,
        Err(error) => return cli::exit::refuse(&error),
    };
    let code = match cli::dispatch(&matches) {
        Ok(code) => code,
        Err(error) => {
            machine::say!("vmm: {}", error.one_line());
            cli::exit::code(error.blame()).into()
        }
    };
    log::logger().flush();
    // Who does not read it now never will.
    let _ = machine::output::stderr().finish(machine::output::AT_END);
    code
}
