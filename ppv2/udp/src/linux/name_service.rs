//! The plug-ins by which glibc looks up users and hosts (nsswitch.conf(5)), in a program that
//! glibc is linked into.

/// Has the C library look up users in `/etc/passwd`, and hosts in `/etc/hosts` and by DNS, if
/// it is linked into the program. To be called before the first lookup.
///
/// For other sources in `/etc/nsswitch.conf`, such as `systemd` and `resolve`, glibc loads
/// shared libraries of the host. They are made for the host's glibc: in a program that brings
/// its own of another version, they can do anything.
pub fn look_up_without_plugins() {
    #[cfg(all(target_env = "gnu", target_feature = "crt-static"))]
    for (database, sources) in [
        (c"passwd", c"files"),
        (c"group", c"files"),
        (c"hosts", c"files dns"),
    ] {
        // SAFETY: the function takes two strings that end with NUL, copies what it keeps of
        // them, and is called by the one thread that there is before the first lookup.
        unsafe { __nss_configure_lookup(database.as_ptr(), sources.as_ptr()) };
    }
}

#[cfg(all(target_env = "gnu", target_feature = "crt-static"))]
unsafe extern "C" {
    /// Of glibc's `nss.h`.
    fn __nss_configure_lookup(
        database: *const libc::c_char,
        sources: *const libc::c_char,
    ) -> libc::c_int;
}
