//! The program takes the place of this process, with the signals that this process was
//! started with.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::execve;

use super::Environment;

/// What execvp(3) runs a script without `#!` by.
const SHELL: &CStr = c"/bin/sh";

/// Runs the program, and returns why that failed.
pub(super) fn execute(path: &Path, arguments: &[OsString], environment: &Environment) -> Errno {
    let Ok(path) = text(path.as_os_str()) else {
        return Errno::EINVAL;
    };
    let arguments: Result<Vec<_>, _> = arguments.iter().map(|word| text(word)).collect();
    let variables = environment.merged().into_iter();
    let variables = variables.map(|(name, value)| {
        let line = [name.into_vec(), b"=".to_vec(), value.into_vec()].concat();
        CString::new(line).map_err(|_| Errno::EINVAL)
    });
    let (arguments, variables) = match (arguments, variables.collect::<Result<Vec<_>, _>>()) {
        (Ok(arguments), Ok(variables)) => (arguments, variables),
        (Err(errno), _) | (_, Err(errno)) => return errno,
    };
    ppv2_udp::restore_sigpipe();
    let Err(errno) = execve(&path, &arguments, &variables);
    if errno != Errno::ENOEXEC {
        return errno;
    }
    let mut script = vec![c"sh".to_owned(), path];
    script.extend(arguments.into_iter().skip(1));
    let Err(errno) = execve(SHELL, &script, &variables);
    errno
}

fn text(words: &OsStr) -> Result<CString, Errno> {
    CString::new(words.as_bytes()).map_err(|_| Errno::EINVAL)
}
