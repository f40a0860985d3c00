//! `man` and `completions`: man pages and scripts for shells, made from the definition of
//! the command line.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use thiserror::Error;

use crate::cli::{Arguments, EXIT_CODES};

/// The name of the binary.
const NAME: &str = "ppv2-proxy";

/// Why there is no man page.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ManualError {
    /// There is no such command.
    #[error("there is no command `{name}`; the commands are {commands}")]
    NoCommand {
        /// As it was asked for.
        name: String,
        /// All that there are.
        commands: String,
    },
    /// The page could not be written.
    #[error("the page could not be written")]
    Write(#[from] io::Error),
}

/// The man page of a command, or that of the program, in roff.
///
/// # Errors
///
/// [`ManualError`].
pub fn page(command: Option<&str>) -> Result<String, ManualError> {
    let mut program = Arguments::command().disable_help_subcommand(true);
    program.build();
    let all = || program.get_subcommands().filter(|sub| !sub.is_hide_set());
    let asked = match command {
        None => &program,
        Some(name) => all().find(|sub| sub.get_name() == name).ok_or_else(|| {
            let commands: Vec<_> = all().map(Command::get_name).collect();
            ManualError::NoCommand {
                name: name.to_owned(),
                commands: commands.join(", "),
            }
        })?,
    };
    let is_program = command.is_none();
    let man = Man::new(asked.clone());
    let title = asked.get_display_name().unwrap_or(NAME);
    let mut text = Vec::new();
    // The library leaves the quotes of an empty date out.
    writeln!(
        text,
        ".TH {title} 1 \"\" \"{NAME} {}\" \"{NAME} manual\"",
        env!("CARGO_PKG_VERSION")
    )?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if is_program {
        man.render_subcommands_section(&mut text)?;
        writeln!(text, ".SH \"EXIT STATUS\"")?;
        for (code, meaning) in EXIT_CODES {
            // Commands and values are between backticks, for the page of the reference.
            writeln!(text, ".TP\n{code}\n{}", meaning.replace('`', "\""))?;
        }
    }
    let mut text = String::from_utf8_lossy(&text).into_owned();
    if let Some(after) = asked.get_after_help() {
        text += ".SH NOTES\n";
        // Those of each command are sentences.
        for line in after.to_string().lines() {
            let _ = writeln!(
                text,
                "{}\n.br",
                line.replace('\\', "\\e").replace('-', "\\-")
            );
        }
    }
    text += ".SH \"SEE ALSO\"\n";
    let others = match is_program {
        true => all().map(Command::get_name).collect(),
        false => vec![""],
    };
    let others: Vec<_> = others
        .into_iter()
        .map(|name| match name {
            "" => format!(".BR {NAME} (1)"),
            name => format!(".BR {NAME}\\-{name} (1)"),
        })
        .collect();
    text += &others.join(",\n");
    text.push('\n');
    Ok(text)
}

/// The script that has `shell` complete the arguments of the program.
#[must_use]
pub fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), NAME, &mut script);
    let script = String::from_utf8_lossy(&script);
    if shell == Shell::Bash {
        // The hyphen of the binary's name is written in two ways, so that nothing behind a
        // command is completed (clap-rs/clap#6421).
        return script.replace("ppv2__subcmd__proxy", "ppv2__proxy");
    }
    script.into_owned()
}
