//! The command line.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format(|out, record| {
            use std::io::Write;
            writeln!(out, "vmm: {}: {}", record.level().as_str().to_lowercase(), record.args())
        })
        .init();
    let first = std::env::args_os().nth(1);
    match cli::dispatch(&cli::commands::grammar(first.as_deref()).get_matches()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vmm: {}", cli::exit::one_line(&error));
            cli::exit::code_of(&error)
        }
    }
}
