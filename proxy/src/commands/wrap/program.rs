//! Finds the program as env(1) does, and looks for what keeps a library from taking its sockets
//! over.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};

use super::elf::{self, Architecture, Elf, Libc};
use super::launcher::Launcher;
use super::privilege::{self, Privilege};
use super::{INSTEAD, WrapError};

/// Where programs are looked for without PATH, as execvp(3) says.
const USUAL_PATH: &str = "/bin:/usr/bin";

/// The scripts that may be the interpreters of scripts: as many as execve(2) follows.
const MAX_SCRIPTS: usize = 4;

/// What execve(2) reads of a script's first line.
const MAX_LINE: u64 = 255;

/// Why no library can take over the sockets of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unsuitable {
    /// Go's runtime makes its system calls itself.
    Go,
    /// No dynamic linker loads it.
    Static,
    /// The program that unpacks it is static.
    AppImage,
    /// It would start another one without the library.
    Launcher(Launcher),
    /// The dynamic linker ignores LD_PRELOAD: setuid, setgid or file capabilities.
    Privileged(Privilege),
    /// The library was built for another processor.
    #[allow(missing_docs, reason = "the message says it")]
    Architecture { program: String, library: String },
    /// The library was built for another C library.
    #[allow(missing_docs, reason = "the message says it")]
    Libc { program: String, library: String },
}

impl fmt::Display for Unsuitable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Go => write!(
                f,
                "is a Go program, which makes its system calls without the C library, so no library can take its \
                 sockets over; {INSTEAD}"
            ),
            Self::Static => write!(
                f,
                "is linked statically, so the kernel loads no library into it; {INSTEAD}, or install a build of \
                 it that is linked dynamically"
            ),
            Self::AppImage => write!(
                f,
                "is an AppImage, which a static program unpacks; call it with --appimage-extract, and `wrap` with \
                 squashfs-root/AppRun"
            ),
            Self::Launcher(launcher) => launcher.fmt(f),
            Self::Privileged(privilege) => privilege.fmt(f),
            Self::Architecture { program, library } => write!(
                f,
                "is built for {program}, and the library for {library}; name a library for {program} with \
                 --library, or {INSTEAD}"
            ),
            Self::Libc { program, library } => write!(
                f,
                "uses {program} as its C library, and the preload library is built for {library}; name one for \
                 {program} with --library, or {INSTEAD}"
            ),
        }
    }
}

/// Whether a program is named by a path, rather than looked for.
pub(super) fn is_path(program: &OsStr) -> bool {
    program.as_bytes().contains(&b'/')
}

/// The file of a program, as execvp(3) finds it.
pub(super) fn find(program: &OsStr) -> Result<PathBuf, WrapError> {
    let not_found = || WrapError::NotFound {
        program: program.to_owned(),
    };
    if is_path(program) {
        let path = PathBuf::from(program);
        return match is_executable(&path) {
            Ok(()) => Ok(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(not_found()),
            Err(error) => Err(WrapError::NotExecutable { path, error }),
        };
    }
    let folders = env::var_os("PATH").unwrap_or_else(|| USUAL_PATH.into());
    let mut refused = None;
    for folder in env::split_paths(&folders).filter(|_| !program.is_empty()) {
        // An empty one is the current folder.
        let path = match folder.as_os_str().is_empty() {
            true => Path::new(".").join(program),
            false => folder.join(program),
        };
        match is_executable(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                refused.get_or_insert(WrapError::NotExecutable { path, error });
            }
            Err(_) => {}
        }
    }
    Err(refused.unwrap_or_else(not_found))
}

/// Whether this process may execute a file.
fn is_executable(path: &Path) -> io::Result<()> {
    let file = fs::metadata(path)?;
    let problem = match file.is_dir() {
        true => "it is a folder",
        false => "it is not a regular file",
    };
    if !file.is_file() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, problem));
    }
    Ok(accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)?)
}

/// What the kernel loads for a program: the program, or what interprets the script.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// `None` if it is not known.
    found: Option<(PathBuf, Elf)>,
    pub(super) warnings: Vec<String>,
}

/// Looks at a program and, if it is a script, at what interprets it. Fails where no library can
/// help.
pub(super) fn look(path: &Path, arguments: &[OsString]) -> Result<Looked, WrapError> {
    let mut looked = Looked::default();
    let warnings = &mut looked.warnings;
    if let Some(launcher) = Launcher::named(path).filter(|launcher| launcher.drops(arguments)) {
        return Err(refused(path.to_owned(), Unsuitable::Launcher(launcher)));
    }
    let mut path = path.to_owned();
    for _ in 0..=MAX_SCRIPTS {
        match elf::read(&path) {
            Ok(Some(elf)) => {
                if let Some(why) = loads_nothing(&elf) {
                    return Err(refused(path, why));
                }
                if elf.needs("liburing") {
                    warnings.push(format!(
                        "{path:?} uses io_uring (it needs liburing), which the library does not see: have the \
                         program use ordinary calls for UDP, if it can"
                    ));
                }
                looked.found = Some((path, elf));
                break;
            }
            // What else the kernel can start is not known here: binfmt_misc.
            Ok(None) => match script(&path) {
                Some(interpreter) => path = interpreter,
                None => break,
            },
            // The kernel says so next.
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            // Such as sudo, which may be executed by all and read by root alone.
            Err(error) => {
                if let Some(privilege) = privilege::of(&path) {
                    return Err(refused(path, Unsuitable::Privileged(privilege)));
                }
                warnings.push(format!("{path:?} can't be checked: {error}"));
                break;
            }
        }
    }
    Ok(looked)
}

impl Looked {
    /// The program, and its C library. That of this host where it is not known.
    pub(super) fn libc(&self) -> (Option<&Path>, Libc) {
        let found = self.found.as_ref();
        let known = found.and_then(|(path, elf)| Some((Some(path.as_path()), elf.libc()?)));
        known.unwrap_or_else(|| (None, libc_of_host()))
    }

    /// Checks that the library can be loaded into it.
    pub(super) fn check(&self, library: &Elf) -> Result<(), WrapError> {
        let found = self.found.as_ref();
        let why = found.and_then(|(path, elf)| Some((path, unsuitable(path, elf, library)?)));
        match why {
            None => Ok(()),
            Some((path, why)) => Err(refused(path.clone(), why)),
        }
    }
}

/// The C library of this host's shell, which runs scripts without `#!`.
fn libc_of_host() -> Libc {
    let shell = elf::read(Path::new("/bin/sh")).ok().flatten();
    shell.and_then(|elf| elf.libc()).unwrap_or(Libc::Glibc)
}

/// Why a program loads no library.
fn loads_nothing(elf: &Elf) -> Option<Unsuitable> {
    match elf.is_program() && !elf.is_dynamic_linker() {
        true if elf.is_go => Some(Unsuitable::Go),
        true if elf.interpreter.is_some() => None,
        true if elf.is_app_image => Some(Unsuitable::AppImage),
        true => Some(Unsuitable::Static),
        false => None,
    }
}

/// A launcher needs no library itself: the program that it starts does.
fn refused(program: PathBuf, why: Unsuitable) -> WrapError {
    let why = match (&why, Launcher::named(&program)) {
        (Unsuitable::Go | Unsuitable::Static | Unsuitable::Privileged(_), Some(launcher)) => {
            Unsuitable::Launcher(launcher)
        }
        _ => why,
    };
    WrapError::Unsuitable { program, why }
}

/// Why this library can't be used with this program.
fn unsuitable(path: &Path, elf: &Elf, library: &Elf) -> Option<Unsuitable> {
    if !elf.is_program() || elf.is_dynamic_linker() {
        return None;
    }
    if elf.machine != library.machine {
        let name = |machine: Architecture| machine.to_string();
        return Some(Unsuitable::Architecture {
            program: name(elf.machine),
            library: name(library.machine),
        });
    }
    if let (Some(program), Some(library)) = (elf.libc(), library.libc())
        && program != library
    {
        let name = |libc: Libc| libc.to_string();
        return Some(Unsuitable::Libc {
            program: name(program),
            library: name(library),
        });
    }
    privilege::of(path).map(Unsuitable::Privileged)
}

/// The interpreter that the first line of a script names. For env(1), it is what env starts.
pub(super) fn interpreter(path: &Path) -> Option<PathBuf> {
    match elf::read(path) {
        Ok(Some(elf)) => elf.interpreter,
        _ => line(path).map(|(interpreter, _)| interpreter),
    }
}

fn script(path: &Path) -> Option<PathBuf> {
    let (interpreter, argument) = line(path)?;
    if interpreter.file_name() != Some(OsStr::new("env")) {
        return Some(interpreter);
    }
    // `env -S` splits what the kernel passes as one argument; without it, there is one word.
    let mut words = argument.split(|byte| byte.is_ascii_whitespace());
    let is_option = |word: &&[u8]| word.is_empty() || word[0] == b'-' || word.contains(&b'=');
    let program = words.find(|word| !is_option(word))?;
    find(OsStr::from_bytes(program)).ok()
}

/// The interpreter and the argument of a script's first line.
fn line(path: &Path) -> Option<(PathBuf, Vec<u8>)> {
    let mut start = Vec::new();
    File::open(path)
        .ok()?
        .take(MAX_LINE)
        .read_to_end(&mut start)
        .ok()?;
    let line = start
        .strip_prefix(b"#!")?
        .split(|byte| *byte == b'\n')
        .next()?;
    let line = line.trim_ascii();
    let end = line
        .iter()
        .position(u8::is_ascii_whitespace)
        .unwrap_or(line.len());
    let (interpreter, argument) = line.split_at(end);
    let path = PathBuf::from(OsString::from_vec(interpreter.to_vec()));
    (!interpreter.is_empty()).then(|| (path, argument.trim_ascii().to_vec()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn file(folder: &tempfile::TempDir, name: &str, content: &str, mode: u32) -> PathBuf {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn the_first_line_names_the_interpreter() {
        let folder = tempfile::tempdir().unwrap();
        let sh = find(OsStr::new("sh")).unwrap();
        for (content, interpreter) in [
            ("#!/bin/sh\necho", Some(Path::new("/bin/sh"))),
            ("#! /bin/sh -e\n", Some(Path::new("/bin/sh"))),
            ("#!/bin/sh", Some(Path::new("/bin/sh"))),
            ("#!/usr/bin/env sh\n", Some(&sh)),
            ("#!/usr/bin/env -S sh -e\n", Some(&sh)),
            ("#!/usr/bin/env -S A=1 sh -e\n", Some(&sh)),
            ("#!/usr/bin/env\n", None),
            ("#!/usr/bin/env no-such-program\n", None),
            ("#!\n", None),
            ("#!  \n", None),
            ("echo\n", None),
            ("", None),
        ] {
            let path = file(&folder, "script", content, 0o755);
            assert_eq!(script(&path).as_deref(), interpreter, "{content:?}");
        }
    }

    #[test]
    fn scripts_of_scripts_are_followed_a_few_times() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loop");
        file(&folder, "loop", &format!("#!{}\n", path.display()), 0o755);
        let own = elf::read(&env::current_exe().unwrap()).unwrap().unwrap();
        let looked = look(&path, &[]).unwrap();
        assert!(looked.warnings.is_empty() && looked.found.is_none());
        looked.check(&own).unwrap();
        assert_eq!(looked.libc(), (None, Libc::Glibc));
    }

    #[test]
    fn programs_are_found_as_env_finds_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, "program", "", 0o755);
        assert_eq!(find(path.as_os_str()).unwrap(), path);
        let exit_code = |path: &Path| find(path.as_os_str()).unwrap_err().exit_code();
        assert_eq!(exit_code(&folder.path().join("none")), 127);
        assert_eq!(exit_code(&path.join("none")), 126);
        assert_eq!(exit_code(folder.path()), 126);
        assert_eq!(exit_code(&file(&folder, "data", "", 0o644)), 126);
        assert_eq!(exit_code(Path::new("no-such-program")), 127);
        assert_eq!(exit_code(Path::new("")), 127);
    }
}
