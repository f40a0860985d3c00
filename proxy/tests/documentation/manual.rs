//! Man pages and completions: every command has them, and the programs that read them find
//! nothing wrong.

use std::io::Write as _;
use std::process::{Command, Stdio};

use clap::CommandFactory;
use clap_complete::Shell;
use ppv2_lab::{binary, output, output_of, write};
use ppv2_proxy::cli::Arguments;
use ppv2_proxy::commands::manual;

/// The names of all commands.
fn commands() -> Vec<String> {
    let program = Arguments::command();
    let shown = program.get_subcommands().filter(|sub| !sub.is_hide_set());
    shown.map(|sub| sub.get_name().to_owned()).collect()
}

/// A page as groff formats it, which must have nothing to warn of.
fn formatted(name: &str, page: &str) -> String {
    let mut groff = Command::new("groff");
    groff.args(["-man", "-ww", "-Tutf8", "-P-cbou", "-rLL=100n"]);
    groff
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let started = groff.spawn();
    let mut groff = started.expect("groff formats man pages: Debian package groff-base");
    let mut input = groff.stdin.take().unwrap();
    input.write_all(page.as_bytes()).unwrap();
    drop(input);
    let output = groff.wait_with_output().unwrap();
    let warnings = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success() && warnings.is_empty(),
        "{name}: {warnings}"
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_command_has_a_man_page_that_groff_accepts() {
    let (code, page, error) = output(&["man"]);
    assert_eq!(code, Some(0), "{error}");
    let program = formatted("ppv2-proxy", &page);
    for part in ["EXIT STATUS", "PPV2_LOG", "SEE ALSO"] {
        assert!(program.contains(part), "no {part} in\n{program}");
    }
    let commands = commands();
    assert!(commands.len() >= 12, "{commands:?}");
    for command in &commands {
        assert!(program.contains(&format!("ppv2-proxy-{command}(1)")));
        let (code, page, error) = output(&["man", command]);
        assert_eq!(code, Some(0), "{command}: {error}");
        let text = formatted(command, &page);
        let mut definition = Arguments::command();
        definition.build();
        let definition = definition.find_subcommand(command).unwrap();
        let about = definition.get_about().unwrap().to_string();
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let text = words(&text);
        // groff writes other characters for these.
        let text = text.replace('’', "'").replace(['‐', '−'], "-");
        let begin = about.split(", ").next().unwrap();
        assert!(text.contains(begin), "{command}: no `{begin}` in {text}");
        for option in definition.get_arguments().filter(|one| !one.is_hide_set()) {
            if let Some(long) = option.get_long() {
                assert!(
                    text.contains(&format!("--{long}")),
                    "{command}: no --{long}"
                );
            }
        }
        if let Some(after) = definition.get_after_help() {
            let last = after.to_string();
            let last = last.split_whitespace().last().unwrap();
            assert!(text.contains(last), "{command}: no `{last}` in {text}");
        }
    }
    let (code, _, error) = output(&["man", "rnu"]);
    assert_eq!(code, Some(2), "{error}");
    for part in ["`rnu`", "run, check"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn bash_completes_commands_and_options() {
    let (code, script, error) = output(&["completions", "bash"]);
    assert_eq!(code, Some(0), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "ppv2-proxy", &script);
    let (code, _, error) = output_of(Command::new("bash").arg("-n").arg(&file));
    assert_eq!((code, error.as_str()), (Some(0), ""));
    for (words, expected) in [
        ("ppv2-proxy ho", vec!["host-setup"]),
        ("ppv2-proxy run --conf", vec!["--config"]),
        ("ppv2-proxy run --mode tr", vec!["transparent"]),
        (
            "ppv2-proxy completions ",
            vec!["bash", "elvish", "fish", "powershell", "zsh"],
        ),
    ] {
        // As bash calls it: the command, the word to complete, and the one before.
        let ask = format!(
            ". {}; COMP_WORDS=({words}{}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             function=$(complete -p ppv2-proxy); function=${{function#* -F }}; \
             ${{function%% *}} ppv2-proxy \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"; \
             echo \"${{COMPREPLY[@]}}\"",
            file.display(),
            if words.ends_with(' ') { "''" } else { "" }
        );
        let (code, completed, error) = output_of(Command::new("bash").args(["-c", &ask]));
        assert_eq!((code, error.as_str()), (Some(0), ""));
        let completed: Vec<_> = completed
            .split_whitespace()
            .filter(|word| !word.starts_with('-') || words.ends_with('f'))
            .collect();
        assert_eq!(completed, expected, "{words}");
    }
}

#[test]
fn every_shell_gets_every_command() {
    for (shell, beginning) in [(Shell::Zsh, "#compdef ppv2-proxy"), (Shell::Fish, "")] {
        let script = manual::completions(shell);
        assert!(script.starts_with(beginning), "{shell}");
        for command in commands() {
            assert!(script.contains(&command), "{shell}: no {command}");
        }
        let (code, printed, _) = output(&["completions", &shell.to_string()]);
        assert_eq!((code, printed), (Some(0), script));
    }
    let (code, _, error) = output(&["completions", "tcsh"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("bash"), "{error}");
}

/// A reader that stops reading, such as `head`, is not an error.
#[test]
fn a_closed_pipe_is_no_error() {
    let script = format!("{} man run | head -n 1", binary().display());
    let (code, title, error) = output_of(Command::new("sh").args(["-c", &script]));
    assert_eq!((code, error.as_str()), (Some(0), ""));
    assert!(title.starts_with(".TH ppv2-proxy-run 1"), "{title}");
}
