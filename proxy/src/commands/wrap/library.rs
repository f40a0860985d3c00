//! Where the preload library is, one for each C library, and what it was built for.

use std::env;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::elf::{self, Elf, Libc};
use super::{WrapError, environment};

/// Where packages and `make install` put it, below the folder of this program's and then
/// wherever this program is.
const OF_PREFIX: &str = "../lib/ppv2";
const OF_HOST: [&str; 2] = ["/usr/lib/ppv2", "/usr/local/lib/ppv2"];

/// The file of the library for a C library; `None` if there is none.
fn name(libc: Libc) -> Option<&'static str> {
    match libc {
        Libc::Glibc => Some("libppv2_preload.so"),
        Libc::Musl => Some("libppv2_preload_musl.so"),
        Libc::Bionic => None,
    }
}

/// The library for programs with this C library: the first of those that this program could
/// belong to. `program` is the one that it is for, if there is one.
pub(super) fn find(libc: Libc, program: Option<&Path>) -> Result<PathBuf, WrapError> {
    let missing = |searched| WrapError::NoLibrary {
        program: program.map(Path::to_owned),
        libc,
        name: name(libc),
        searched,
    };
    let Some(name) = name(libc) else {
        return Err(missing(Vec::new()));
    };
    let own = env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent);
    let folders = folders(beside);
    for folder in &folders {
        let file = folder.join(name);
        if file.is_file() {
            return absolute(&file);
        }
    }
    let searched = folders.iter().map(|folder| folder.display().to_string());
    Err(missing(searched.collect()))
}

/// The folders that are searched, in this order.
fn folders(beside: Option<&Path>) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    if let Some(beside) = beside {
        folders.push(beside.to_owned());
        folders.extend(beside.parent().map(|_| clean(&beside.join(OF_PREFIX))));
    }
    for folder in OF_HOST.map(PathBuf::from) {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

/// A path without `..`, as messages show it. Nothing in the path of a running program is a
/// symbolic link.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path {
        match part.as_bytes() {
            b".." => drop(clean.pop()),
            _ => clean.push(part),
        }
    }
    clean
}

/// The path as the dynamic linker takes it: whole, and without what it would split or expand.
pub(super) fn absolute(path: &Path) -> Result<PathBuf, WrapError> {
    let path = environment::absolute("--library", path)?;
    let bytes = path.as_os_str().as_bytes();
    if bytes.iter().any(|byte| b" :$".contains(byte)) {
        let problem = "it has a space, a colon or a dollar sign, which LD_PRELOAD can't carry; move or link the file";
        return Err(WrapError::option(
            "--library",
            format_args!("{path:?}"),
            problem,
        ));
    }
    Ok(path)
}

/// What the library was built for.
pub(super) fn read(path: &Path) -> Result<Elf, WrapError> {
    let wrong = |problem: String| WrapError::Library {
        path: path.to_owned(),
        problem,
    };
    let file = elf::read(path).map_err(|error| wrong(format!("can't be read: {error}")))?;
    let elf = file.filter(|elf| elf.is_library());
    elf.ok_or_else(|| wrong("is no shared library".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_near_the_program_come_first() {
        let names = |beside: Option<&str>| -> Vec<_> {
            let folders = folders(beside.map(Path::new));
            let names = folders.iter().map(|folder| folder.display().to_string());
            names.collect()
        };
        let host = ["/usr/lib/ppv2", "/usr/local/lib/ppv2"];
        assert_eq!(names(None), host);
        assert_eq!(
            names(Some("/opt/ppv2/bin")),
            ["/opt/ppv2/bin", "/opt/ppv2/lib/ppv2", host[0], host[1]]
        );
        assert_eq!(names(Some("/usr/bin")), ["/usr/bin", host[0], host[1]]);
        assert_eq!(
            names(Some("/usr/local/bin")),
            ["/usr/local/bin", host[1], host[0]]
        );
    }

    #[test]
    fn what_ld_preload_can_not_carry_is_refused() {
        for path in ["/a b.so", "/a:b.so", "/$LIB/b.so", "/a\nb.so"] {
            let error = absolute(Path::new(path)).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let text = error.to_string();
            assert!(text.starts_with("--library"), "{text}");
        }
        assert!(absolute(Path::new("b.so")).unwrap().is_absolute());
    }
}
