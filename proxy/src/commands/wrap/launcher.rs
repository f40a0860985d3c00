//! Programs that start another one: which of them do so without the environment that `wrap`
//! gives them.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::Path;

/// A program that starts another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launcher {
    name: &'static str,
    drops: Drops,
}

/// When it starts the other one without the environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drops {
    /// Unless it is static or setuid: never.
    Never,
    /// If an option says so.
    With(&'static [&'static str]),
    /// Unless its configuration says otherwise.
    Always,
    /// A service starts the other one.
    Elsewhere,
}

const LOGIN: Drops = Drops::With(&["-", "-l", "--login"]);

const LAUNCHERS: [(&str, Drops); 20] = [
    ("catatonit", Drops::Never),
    ("chpst", Drops::Never),
    ("doas", Drops::Always),
    ("docker", Drops::Elsewhere),
    ("dumb-init", Drops::Never),
    ("env", Drops::With(&["-", "-i", "--ignore-environment"])),
    ("gosu", Drops::Never),
    ("pkexec", Drops::Always),
    ("podman", Drops::Elsewhere),
    ("runuser", LOGIN),
    ("s6-setuidgid", Drops::Never),
    ("setpriv", Drops::With(&["--reset-env"])),
    ("setuidgid", Drops::Never),
    ("su", LOGIN),
    ("su-exec", Drops::Never),
    ("sudo", Drops::Always),
    ("systemctl", Drops::Elsewhere),
    ("systemd-run", Drops::Always),
    ("tini", Drops::Never),
    ("tini-static", Drops::Never),
];

impl Launcher {
    pub(super) fn named(program: &Path) -> Option<Self> {
        let found = LAUNCHERS
            .into_iter()
            .find(|(name, _)| program.file_name() == Some(OsStr::new(name)));
        found.map(|(name, drops)| Self { name, drops })
    }

    /// Whether it starts another program without the environment, if it is called like this.
    pub(super) fn drops(&self, arguments: &[OsString]) -> bool {
        match self.drops {
            Drops::Never => false,
            Drops::Always | Drops::Elsewhere => true,
            Drops::With(options) => arguments
                .iter()
                .skip(1)
                .map_while(|word| word.to_str().filter(|word| word.starts_with('-')))
                .any(|word| options.contains(&word)),
        }
    }
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name;
        match self.drops {
            Drops::Elsewhere => write!(
                f,
                "has a service start the program, without the library; put `ppv2-proxy wrap` in front of the program \
                 in the unit or the image, see `docs/guides/preload.md`"
            ),
            Drops::Never | Drops::With(_) | Drops::Always => write!(
                f,
                "would start the program without the library; put it in front of `wrap`: \
                 {name} … ppv2-proxy wrap … -- PROGRAM"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launchers_that_drop_the_environment_are_known() {
        for (line, drops) in [
            ("/usr/bin/sudo -u nsd nsd", true),
            ("sudo", true),
            ("systemctl start nsd", true),
            ("su - nsd -c nsd", true),
            ("su nsd -c nsd", false),
            ("runuser -l nsd -c nsd", true),
            ("runuser -u nsd -- nsd -l", false),
            ("env -i nsd", true),
            ("env A=1 nsd -i", false),
            ("setpriv --reuid=nsd --reset-env nsd", true),
            ("setpriv --reuid=nsd nsd --reset-env", false),
            ("gosu nsd nsd", false),
        ] {
            let words: Vec<_> = line.split(' ').map(OsString::from).collect();
            let launcher = Launcher::named(Path::new(&words[0])).unwrap();
            assert_eq!(launcher.drops(&words), drops, "{line}");
        }
        assert_eq!(Launcher::named(Path::new("/usr/sbin/nsd")), None);
        assert_eq!(Launcher::named(Path::new("sudoers")), None);
    }
}
