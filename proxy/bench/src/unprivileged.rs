//! What a program needs that runs as a user who may see next to nothing: copies that
//! everybody may read.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A folder, and the copies of files in it. It is removed when it is dropped.
pub(crate) struct Copies {
    pub(crate) folder: PathBuf,
    /// In the order of what they are copies of.
    pub(crate) files: Vec<PathBuf>,
}

impl Drop for Copies {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Whether a program can be started as another user: by root, and not by one who is root
/// in a user namespace alone.
pub(crate) fn can_be() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let all = u32::MAX.to_string();
    rustix::process::geteuid().is_root() && map.split_whitespace().eq(["0", "0", all.as_str()])
}

pub(crate) fn copies(files: &[&Path]) -> Result<Copies> {
    let folder = std::env::temp_dir().join(format!("ppv2-bench-{}", std::process::id()));
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let mut copies = Copies {
        folder: folder.clone(),
        files: Vec::new(),
    };
    fs::set_permissions(&folder, Permissions::from_mode(0o755))?;
    for file in files {
        let copy = folder.join(file.file_name().context("a file has a name")?);
        fs::copy(file, &copy).with_context(|| format!("copying {}", file.display()))?;
        fs::set_permissions(&copy, Permissions::from_mode(0o755))?;
        copies.files.push(copy);
    }
    Ok(copies)
}
