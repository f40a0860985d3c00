//! What starts the proxy as systemd does, and keeps descriptors for its next process: a small
//! program that stands in for it, and systemd itself.

mod systemd;

use std::process::Command;

pub use systemd::Systemd;

/// The small program, which starts `program` with these sockets. Its file says what they are,
/// and what it does at which signal.
pub fn stand_in(sockets: &[String], program: &Command) -> Command {
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/src/service_manager/stand_in.py"
    );
    let mut command = Command::new("python3");
    command.arg(script).args(sockets).arg("--");
    command.arg(program.get_program()).args(program.get_args());
    command
}
