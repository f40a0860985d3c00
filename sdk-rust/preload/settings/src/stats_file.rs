//! Opens the file of PPV2_STATS, or says why it can't hold the statistics.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Seek as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// What a file with statistics begins with, in every version.
pub const START: &str = "# HELP ppv2_preload_";

/// Others may read it.
const MODE: u32 = 0o644;

/// Why a file can't hold the statistics.
#[derive(Debug, Error)]
pub enum StatsFileError {
    /// It is a folder.
    #[error("it is a folder; name a file in it, such as {}", .0.join("ppv2.prom").display())]
    Folder(PathBuf),
    /// The folder that it is to be created in is missing.
    #[error("the folder {} does not exist; create it first", .0.display())]
    NoFolder(PathBuf),
    /// A link of another user could lead to any file of this one.
    #[error("it is a symbolic link, which is not followed; name the file itself")]
    Link,
    /// It is a device, a pipe or a socket.
    #[error("it is not a regular file; name another")]
    Special,
    /// A user who shortens a file that a program has mapped ends the program.
    #[error(
        "it belongs to another user (ID {owner}), who could end the program by shortening it; name another file, or remove it"
    )]
    Owner {
        /// The user's ID.
        owner: u32,
    },
    /// As for another user's.
    #[error(
        "every user may write to it, and could end the program by shortening it; run `chmod o-w` on it, or remove it"
    )]
    Writable,
    /// It would be overwritten.
    #[error("it holds something else than statistics; name another file, or remove it")]
    Foreign,
    /// It can't be created, opened, or read.
    #[error("{0}; name a file that the program may create and write")]
    Io(#[from] io::Error),
}

/// Creates the file, or opens one that this user or root has created before. It is empty, or
/// begins with [`START`].
///
/// # Errors
///
/// [`StatsFileError`], with the file as it was.
pub fn open(file: &Path, user: u32) -> Result<File, StatsFileError> {
    let opened = create_or_open(file).map_err(|error| explain(file, error))?;
    let metadata = opened.metadata()?;
    if !metadata.is_file() {
        return Err(StatsFileError::Special);
    }
    let owner = metadata.uid();
    if ![0, user].contains(&owner) {
        return Err(StatsFileError::Owner { owner });
    }
    if metadata.mode() & 0o002 != 0 {
        return Err(StatsFileError::Writable);
    }
    let mut start = Vec::new();
    (&opened).take(START.len() as u64).read_to_end(&mut start)?;
    if !start.is_empty() && start != START.as_bytes() {
        return Err(StatsFileError::Foreign);
    }
    (&opened).rewind()?;
    Ok(opened)
}

fn create_or_open(file: &Path) -> io::Result<File> {
    let open = |create| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(create).mode(MODE);
        // A pipe must not have the program wait.
        options.custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOFOLLOW);
        options.open(file)
    };
    match open(true) {
        Ok(created) => {
            // Whatever the umask is.
            created.set_permissions(Permissions::from_mode(MODE))?;
            Ok(created)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => open(false),
        Err(error) => Err(error),
    }
}

/// Why a file can't be opened, in words that lead to what to do.
fn explain(file: &Path, error: io::Error) -> StatsFileError {
    let folder = file
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty() && !folder.exists());
    match fs::symlink_metadata(file) {
        Ok(metadata) if metadata.is_dir() => StatsFileError::Folder(file.to_owned()),
        Ok(metadata) if metadata.is_symlink() => StatsFileError::Link,
        Ok(metadata) if !metadata.is_file() => StatsFileError::Special,
        _ if error.kind() == io::ErrorKind::NotFound => match folder {
            Some(folder) => StatsFileError::NoFolder(folder.to_owned()),
            None => error.into(),
        },
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;

    const OTHER: u32 = 12_345;

    /// Opens a file as its owner.
    fn open(file: &Path) -> Result<File, StatsFileError> {
        let folder = fs::metadata(file.parent().unwrap());
        super::open(file, folder.map_or(0, |folder| folder.uid()))
    }

    #[test]
    fn a_file_is_created_for_all_to_read_and_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("stats");
        assert_eq!(open(&file).unwrap().metadata().unwrap().len(), 0);
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o644);
        fs::write(&file, format!("{START}of another version")).unwrap();
        let mut text = String::new();
        open(&file).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("{START}of another version"));
    }

    #[test]
    fn what_can_not_hold_statistics_is_named_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name| folder.path().join(name);
        let [victim, link, dangling] = ["victim", "link", "dangling"].map(place);
        fs::write(&victim, "").unwrap();
        symlink(&victim, &link).unwrap();
        symlink(place("nowhere"), &dangling).unwrap();
        let [foreign, writable, socket] = ["foreign", "writable", "socket"].map(place);
        fs::write(&foreign, "precious").unwrap();
        fs::write(&writable, "").unwrap();
        fs::set_permissions(&writable, Permissions::from_mode(0o646)).unwrap();
        let _listener = UnixListener::bind(&socket).unwrap();
        let within = folder.path().join("ppv2.prom").display().to_string();
        let missing = place("none").display().to_string();
        for (file, parts) in [
            (folder.path(), ["is a folder", &within]),
            (&link, ["is a symbolic link", "name the file itself"]),
            (&dangling, ["is a symbolic link", "name the file itself"]),
            (&foreign, ["something else than statistics", "remove it"]),
            (&writable, ["every user may write", "chmod o-w"]),
            (&socket, ["not a regular file", "name another"]),
            (
                Path::new("/dev/null"),
                ["not a regular file", "name another"],
            ),
            (
                &place("none/stats"),
                [&missing, "does not exist; create it"],
            ),
            (&foreign.join("stats"), ["Not a directory", "name a file"]),
            (
                Path::new("/proc/stats"),
                ["may create and write", "name a file"],
            ),
        ] {
            let error = open(file).unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "{file:?}: no `{part}` in {error}");
            }
        }
        assert_eq!(fs::read(&victim).unwrap(), b"");
        assert_eq!(fs::read(&foreign).unwrap(), b"precious");
        assert!(!place("nowhere").exists());
    }

    #[test]
    fn a_file_of_another_user_is_refused_and_one_of_root_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("stats");
        fs::write(&file, "").unwrap();
        let owner = fs::metadata(&file).unwrap().uid();
        if owner == 0 {
            super::open(&file, OTHER).unwrap();
            chown(&file, Some(OTHER + 1), None).unwrap();
        }
        let owner = fs::metadata(&file).unwrap().uid();
        super::open(&file, owner).unwrap();
        let error = super::open(&file, OTHER).unwrap_err().to_string();
        assert!(
            error.contains(&format!("another user (ID {owner})")),
            "{error}"
        );
    }
}
