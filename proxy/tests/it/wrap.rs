//! `wrap` runs a program with a library, or says why none can help it. The library of most tests
//! does nothing: what the real one does is tested where it is.

use std::ffi::{OsStr, OsString};
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ppv2_lab::namespace::enter_as_root;
use ppv2_lab::*;
use tempfile::TempDir;

/// A folder with a library in it, for this machine and glibc.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.compile(
            "libppv2_preload.so",
            "int puts(const char *); int says(void) { return puts(\"loaded\"); }",
            &["-shared", "-fPIC"],
        );
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A program or a library, from a line of C.
    #[track_caller]
    fn compile(&self, name: &str, source: &str, options: &[&str]) -> PathBuf {
        self.compile_by(Command::new("cc"), name, source, options)
    }

    #[track_caller]
    fn compile_by(&self, mut cc: Command, name: &str, source: &str, options: &[&str]) -> PathBuf {
        let (path, file) = (self.path(name), self.path("source.c"));
        fs::write(&file, source).unwrap();
        cc.arg(&file).args(options).arg("-o").arg(&path);
        let (code, out, error) = output_of(&mut cc);
        assert_eq!(code, Some(0), "{cc:?}: {out}{error}");
        path
    }

    /// A program that only exits with 7.
    fn program(&self, name: &str, options: &[&str]) -> PathBuf {
        self.compile(name, "int main(void) { return 7; }", options)
    }

    /// An executable file.
    #[track_caller]
    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let (path, source) = (self.path(name), self.path("content"));
        fs::write(&source, content).unwrap();
        install(&source, &path);
        path
    }

    /// `wrap` with this library and one trusted proxy.
    fn wrap(&self, options: &[&str], program: &[&OsStr]) -> Command {
        let mut command = Command::new(binary());
        command.args(["wrap", "--trusted", "192.0.2.1", "--library"]);
        command.arg(self.path("libppv2_preload.so"));
        command.args(options).arg("--").args(program);
        command.env_remove("LD_PRELOAD");
        command
    }

    #[track_caller]
    fn runs(&self, program: &Path) -> String {
        let (code, out, error) = output_of(&mut self.wrap(&[], &[program.as_os_str()]));
        assert_eq!(code, Some(7), "{program:?}: {out}{error}");
        error
    }

    #[track_caller]
    fn refuses(&self, program: &Path, code: i32, parts: &[&str]) {
        refused(&mut self.wrap(&[], &[program.as_os_str()]), code, parts);
    }
}

/// Makes an executable copy. Another process does, since no file can be executed that a process
/// has open to write, and that of the tests starts others all the time.
#[track_caller]
fn install(file: &Path, copy: &Path) {
    let (code, _, error) = output_of(Command::new("install").args([file, copy]));
    assert_eq!(code, Some(0), "{error}");
}

/// The command ends with this code, after one line with all of these parts.
#[track_caller]
fn refused(command: &mut Command, code: i32, parts: &[&str]) {
    let (status, out, error) = output_of(command);
    assert_eq!(status, Some(code), "{command:?}: {out}{error}");
    assert_eq!(out, "", "{command:?}");
    for part in parts {
        assert!(error.contains(part), "no `{part}` in {error}");
    }
    let lines = error.trim_end().lines();
    assert!(code == 2 || lines.count() == 1, "{error}");
}

fn words<'a>(words: &'a [&'a str]) -> Vec<&'a OsStr> {
    words.iter().map(OsStr::new).collect()
}

#[test]
fn the_environment_reaches_the_program() {
    let folder = Folder::new();
    let other = folder.compile("other.so", "int other;", &["-shared", "-fPIC"]);
    let options = ["--only", "53", "--only", "[::]:5060", "--peer", "192.0.2.7"];
    let mut command = folder.wrap(&options, &words(&["env"]));
    command.env("LD_PRELOAD", &other);
    // Nobody has asked for that here.
    command.env("PPV2_UNTRUSTED", "accept");
    command.env("PPV2_STATS", "/nonexistent");
    command.env("PPV2_LOG", "warn").env("OF_THE_PROGRAM", "a=b");
    // These name the libraries to these tests.
    command.env_remove("PPV2_PRELOAD");
    command.env_remove("PPV2_PRELOAD_MUSL");
    let (code, out, error) = output_of(&mut command);
    assert_eq!((code, error.as_str()), (Some(0), ""), "{out}");
    let mut found: Vec<_> = out.lines().collect();
    found.retain(|line| {
        ["PPV2", "LD_P", "OF_T"]
            .iter()
            .any(|name| line.starts_with(name))
    });
    found.sort_unstable();
    let library = folder.path("libppv2_preload.so");
    let preload = format!("LD_PRELOAD={}:{}", library.display(), other.display());
    let expected = [
        &preload,
        "OF_THE_PROGRAM=a=b",
        "PPV2_LOG=warn",
        "PPV2_ONLY=53,[::]:5060",
        "PPV2_PEERS=192.0.2.7",
        "PPV2_TRUSTED=192.0.2.1",
    ];
    assert_eq!(found, expected);
}

#[test]
fn the_process_becomes_the_program() {
    let folder = Folder::new();
    let script = "echo $$; echo \"$0 $1\"; exit 9";
    let mut command = folder.wrap(
        &[],
        &words(&["sh", "-c", script, "an argument", "--print-env"]),
    );
    let child = command.stdout(Stdio::piped()).spawn().unwrap();
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(9));
    let expected = format!("{pid}\nan argument --print-env\n");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);

    let mut command = folder.wrap(&[], &words(&["sleep", "1h"]));
    let mut sleeping = Process::start(&mut command);
    let comm = format!("/proc/{}/comm", sleeping.pid());
    eventually("sleep runs", || {
        fs::read_to_string(&comm).unwrap() == "sleep\n"
    });
    sleeping.signal("TERM");
    let (status, log) = sleeping.wait();
    assert_eq!((status.code(), log.as_str()), (None, ""));
}

/// systemd has services ignore SIGPIPE, shells do not.
#[test]
fn signals_are_handled_as_they_were() {
    let folder = Folder::new();
    for ignored in ["PIPE", "HUP"] {
        for start in ["", "trap '' PIPE HUP; "] {
            let inner = "grep SigIgn /proc/self/status";
            let wrap = folder.wrap(&[], &words(&["sh", "-c", inner]));
            // The tests themselves may run under nohup.
            let mut shell = Command::new("env");
            shell.args(["--default-signal=PIPE,HUP", "sh", "-c"]);
            shell.arg(format!("{start}exec \"$0\" \"$@\""));
            shell.arg(wrap.get_program()).args(wrap.get_args());
            let (code, out, error) = output_of(&mut shell);
            assert_eq!(code, Some(0), "{error}");
            let mask = out.trim_end().rsplit('\t').next().unwrap();
            let mask = u64::from_str_radix(mask, 16).unwrap();
            let number = if ignored == "PIPE" { 13 } else { 1 };
            assert_eq!(
                mask >> (number - 1) & 1 == 1,
                !start.is_empty(),
                "{ignored} {start}"
            );
        }
    }
}

#[test]
fn wrong_options_stop_before_the_program_starts() {
    let folder = Folder::new();
    let made = folder.path("made");
    for (options, parts) in [
        (
            &["--trusted", "192.0.2.300"][..],
            &["--trusted", "`192.0.2.300` is not a network"][..],
        ),
        (
            &["--trusted", "192.0.2.1/24"],
            &["--trusted", "the network is 192.0.2.0/24"],
        ),
        (
            &["--peer", "192.0.2.1/24"],
            &["--peer", "the network is 192.0.2.0/24"],
        ),
        (
            &["--only", "dns"],
            &["--only", "\"dns\" names no socket", "5000-5010"],
        ),
        (&["--only", "192.0.2.1:0"], &["--only", "has port 0"]),
        (
            &["--untrusted", "maybe"],
            &["--untrusted", "[possible values: drop, accept]"],
        ),
        (
            &["--format", "spp", "--remember", "30s"],
            &["--remember 30s: with `--format spp`", "leave out one"],
        ),
        (&["--forget-after", "0s"], &["--forget-after", "too short"]),
        (&["--max-clients", "0"], &["--max-clients", "out of range"]),
        (
            &["--pktinfo", "none"],
            &["--pktinfo", "[possible values: local, destination]"],
        ),
        (&["--stats", "a\nb"], &["--stats", "control characters"]),
        (&["--library", "/a b.so"], &["--library", "a space"]),
        (&["--trustd", "192.0.2.1"], &["--trustd"]),
    ] {
        let mut command = folder.wrap(options, &words(&["touch"]));
        if options[0] == "--library" {
            let arguments = [
                "wrap",
                "--trusted",
                "192.0.2.1",
                "--library",
                "/a b.so",
                "--",
                "touch",
            ];
            command = Command::new(binary());
            command.args(arguments);
        }
        refused(command.arg(&made), 2, parts);
    }
    let mut command = Command::new(binary());
    refused(command.args(["wrap", "--", "true"]), 2, &["--trusted"]);
    let mut command = Command::new(binary());
    refused(
        command.args(["wrap", "--trusted", "192.0.2.1"]),
        2,
        &["<PROGRAM>"],
    );
    assert!(!made.exists());
}

/// In the library's words, which says the same where the environment is set by other means.
#[test]
fn a_statistics_file_that_can_not_be_used_stops_before_the_program_starts() {
    let folder = Folder::new();
    let made = folder.path("made");
    let [link, foreign, missing] = ["link", "foreign", "none/stats"].map(|name| folder.path(name));
    std::os::unix::fs::symlink(folder.path("elsewhere"), &link).unwrap();
    fs::write(&foreign, "precious").unwrap();
    for (file, problem) in [
        (folder.0.path(), "it is a folder; name a file in it"),
        (&link, "it is a symbolic link"),
        (&foreign, "it holds something else than statistics"),
        (&missing, "none does not exist; create it first"),
        (Path::new("/dev/null"), "it is not a regular file"),
    ] {
        let file = file.to_str().unwrap();
        let mut command = folder.wrap(&["--stats", file], &words(&["touch"]));
        let wrong = format!("--stats {file}: ");
        refused(command.arg(&made), 2, &[&wrong, problem]);

        let mut command = Command::new("touch");
        command.arg(&made).env("LD_PRELOAD", preload_library());
        command.env("PPV2_TRUSTED", "192.0.2.1");
        let wrong = format!("PPV2_STATS={file}: ");
        refused(command.env("PPV2_STATS", file), 2, &[&wrong, problem]);
    }
    assert!(!made.exists());
    assert_eq!(fs::read(&foreign).unwrap(), b"precious");
}

#[test]
fn networks_of_everybody_are_warned_of() {
    let folder = Folder::new();
    for (options, networks) in [
        (&["--trusted", "192.0.0.0/8"][..], &[][..]),
        (&["--trusted", "0.0.0.0/0"], &["0.0.0.0/0"]),
        (
            &["--trusted", "::/0", "--trusted", "0.0.0.0/0"],
            &["::/0", "0.0.0.0/0"],
        ),
    ] {
        let (code, _, error) = output_of(&mut folder.wrap(options, &words(&["true"])));
        assert_eq!(code, Some(0), "{error}");
        let warnings: Vec<_> = error.lines().collect();
        let expected: Vec<_> = networks
            .iter()
            .map(|network| {
                format!(
                    "ppv2-proxy: warning: --trusted {network}: anybody can send a header that names any client. \
                     Name the addresses of the proxies alone"
                )
            })
            .collect();
        assert_eq!(warnings, expected);
    }
}

#[test]
fn exit_codes_are_those_of_env() {
    let folder = Folder::new();
    folder.refuses(
        Path::new("no-such-program"),
        127,
        &["\"no-such-program\" is not found in PATH; name its path"],
    );
    folder.refuses(&folder.path("none"), 127, &["none\" is not found"]);
    folder.refuses(folder.0.path(), 126, &["can't be executed: it is a folder"]);
    let data = folder.path("data");
    fs::write(&data, "").unwrap();
    folder.refuses(&data, 126, &["data\" can't be executed: Permission denied"]);
    let orphan = folder.file("orphan", b"#!/nonexistent/interpreter\n");
    folder.refuses(
        &orphan,
        126,
        &[
            "orphan\"",
            "its interpreter \"/nonexistent/interpreter\" does not exist",
        ],
    );
    let broken = folder.file("broken", b"\x7fELF\x02\x01\x01 and no more");
    let (_, _, error) = output_of(&mut folder.wrap(&[], &[broken.as_os_str()]));
    assert!(error.contains("broken\" can't be checked: "), "{error}");

    // Found behind one that can't be executed.
    let mut command = folder.wrap(&[], &words(&["data"]));
    let elsewhere = tempfile::tempdir().unwrap();
    let path = format!(
        "{}:{}",
        folder.0.path().display(),
        elsewhere.path().display()
    );
    command.env("PATH", &path);
    refused(&mut command, 126, &["data\" can't be executed"]);
    let script = folder.file("script", b"exit 7\n");
    install(&script, &elsewhere.path().join("data"));
    assert_eq!(
        output_of(&mut command).0,
        Some(7),
        "a script without #!, by the shell"
    );
}

#[test]
fn a_static_program_is_refused() {
    let folder = Folder::new();
    let parts = ["is linked statically", "unwrapper or mode transparent"];
    for options in [&["-static"][..], &["-static-pie"]] {
        let program = folder.program("static", options);
        folder.refuses(&program, 1, &parts);
    }
    // Whatever is in front of it.
    let program = folder.program("static", &["-static"]);
    let script = folder.file(
        "script",
        format!("#! {} -x\n", program.display()).as_bytes(),
    );
    folder.refuses(&script, 1, &["static\" is linked statically"]);
    let outer = folder.file("outer", format!("#!{}\n", script.display()).as_bytes());
    folder.refuses(&outer, 1, &["static\" is linked statically"]);
    let by_env = folder.file("by-env", b"#!/usr/bin/env -S A=1 static -x\n");
    let mut command = folder.wrap(&[], &[by_env.as_os_str()]);
    command.env(
        "PATH",
        format!("{}:/usr/bin:/bin", folder.0.path().display()),
    );
    refused(&mut command, 1, &["static\" is linked statically"]);
    // A dynamic one runs, however it is started.
    let dynamic = folder.program("dynamic", &[]);
    assert_eq!(folder.runs(&dynamic), "");
    let script = folder.file("script", format!("#!{}\n", dynamic.display()).as_bytes());
    assert_eq!(folder.runs(&script), "");
}

#[test]
fn a_dynamic_linker_in_front_is_no_static_program() {
    let folder = Folder::new();
    let program = folder.program("dynamic", &[]);
    let (_, headers, _) = output_of(
        Command::new("readelf")
            .arg("--program-headers")
            .arg(&program),
    );
    let linker = headers.split("interpreter: ").nth(1).unwrap();
    let linker = linker.split(']').next().unwrap();
    let command = &mut folder.wrap(&[], &[OsStr::new(linker), program.as_os_str()]);
    assert_eq!(output_of(command), (Some(7), String::new(), String::new()));
}

#[test]
fn a_go_program_is_refused_with_and_without_its_symbols() {
    let folder = Folder::new();
    let info = folder.file("info", b"\xff Go buildinf:");
    for (options, name) in [
        (&["-static"][..], ".go.buildinfo"),
        (&[], ".go.buildinfo"),
        (&[], ".note.go.buildid"),
    ] {
        let (plain, program) = (folder.program("plain", options), folder.path("caddy"));
        let mut objcopy = Command::new("objcopy");
        let section = format!("{name}={}", info.display());
        objcopy.args(["--strip-all", "--add-section", &section]);
        let (code, _, error) = output_of(objcopy.args([&plain, &program]));
        assert_eq!(code, Some(0), "{error}");
        folder.refuses(
            &program,
            1,
            &["caddy\" is a Go program", "without the C library"],
        );
    }
}

#[test]
fn another_architecture_or_libc_is_named() {
    let folder = Folder::new();
    let program = folder.program("program", &[]);
    let own = std::env::consts::ARCH.replace('_', "-");
    let own = own.replace("aarch64", "64-bit ARM");
    // e_machine of elf(5): PowerPC64.
    let mut foreign = fs::read(program).unwrap();
    foreign[18] = 21;
    let foreign = folder.file("foreign", &foreign);
    let parts = [
        "foreign\" is built for 64-bit POWER",
        &format!("the library for {own}"),
        "--library",
    ];
    folder.refuses(&foreign, 1, &parts);

    let linker = "-Wl,--dynamic-linker=/lib/ld-musl-x86_64.so.1";
    let musl = folder.program("musl", &[linker]);
    folder.refuses(
        &musl,
        1,
        &["uses musl as its C library", "is built for glibc"],
    );
}

#[test]
fn io_uring_is_warned_of() {
    let folder = Folder::new();
    let library = folder.compile(
        "liburing.so.2",
        "int io_uring(void) { return 7; }",
        &["-shared", "-fPIC", "-Wl,-soname,liburing.so.2"],
    );
    let run_path = format!("-Wl,-rpath,{}", folder.0.path().display());
    let source = "int io_uring(void); int main(void) { return io_uring(); }";
    let program = folder.compile("program", source, &[library.to_str().unwrap(), &run_path]);
    let said = folder.runs(&program);
    assert!(said.starts_with("ppv2-proxy: warning: "), "{said}");
    assert!(said.contains("uses io_uring (it needs liburing)"), "{said}");
}

/// A program that tells whether the dynamic linker ignores the library.
#[test]
fn programs_are_refused_where_the_kernel_has_the_library_ignored() {
    const USER: &str = "--reuid=65534 --regid=65534 --clear-groups";

    if !enter_as_root(test_name!()) {
        return;
    }
    let folder = Folder::new();
    fs::set_permissions(folder.0.path(), Permissions::from_mode(0o755)).unwrap();
    let proxy = folder.path("ppv2-proxy");
    install(binary(), &proxy);
    let source = "#include <sys/auxv.h>\n\
                  int main(void) { return getauxval(AT_SECURE) ? 23 : 7; }";
    let program = folder.compile("program", source, &[]);
    let of = |users: &str| {
        let mut command = Command::new("setpriv");
        command.args(users.split(' '));
        command
    };
    // The kernel and `wrap` must say the same, with each of these users.
    let check = |parts: &[&str]| {
        let mut ignored = 0;
        for users in [
            USER,
            &format!("{USER} --no-new-privs"),
            &format!("{USER} --inh-caps=+net_bind_service"),
            &format!("{USER} --bounding-set=-net_bind_service"),
            "--ruid=65533 --euid=65534 --regid=65534 --clear-groups",
            "--reuid=65534 --rgid=65533 --egid=65534 --clear-groups",
            "--reuid=0",
        ] {
            let (code, _, _) = output_of(of(users).arg("env").arg(&program));
            let wrap = folder.wrap(&[], &[program.as_os_str()]);
            let mut wrapped = of(users);
            wrapped.arg(&proxy).args(wrap.get_args());
            if code == Some(7) {
                let (code, _, error) = output_of(&mut wrapped);
                assert_eq!(code, Some(7), "{users}: {error}");
                continue;
            }
            refused(&mut wrapped, 1, &["ignores LD_PRELOAD"]);
            if users == USER {
                refused(&mut wrapped, 1, parts);
            }
            ignored += 1;
        }
        ignored
    };
    let set = |owner, mode| {
        std::os::unix::fs::chown(&program, Some(owner), Some(owner)).unwrap();
        fs::set_permissions(&program, Permissions::from_mode(mode)).unwrap();
    };
    for (owner, mode, parts, ignored) in [
        (0, 0o755, &[][..], 2),
        (0, 0o4755, &["is setuid", "user ID 0", "chmod u-s"], 5),
        (0, 0o4711, &["is setuid", "user ID 0", "chmod u-s"], 5),
        (0, 0o2755, &["is setgid", "ID 0", "chmod g-s"], 5),
        (65534, 0o6755, &[], 3),
        // Without the right to execute, the bit means something else.
        (0, 0o2745, &[], 2),
    ] {
        set(owner, mode);
        assert_eq!(check(parts), ignored, "{owner} {mode:o}");
    }
    set(0, 0o755);
    // CAP_NET_BIND_SERVICE: capabilities(7), version 2 of the attribute.
    for (effective, permitted, inheritable, ignored) in [
        (1, 1 << 10, 0, 6),
        (0, 1 << 10, 0, 4),
        (0, 0, 1 << 10, 3),
        (1, 0, 1 << 10, 6),
        (1, 0, 0, 6),
    ] {
        let words: [u32; 5] = [0x0200_0000 | effective, permitted, inheritable, 0, 0];
        let attribute: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&program, "security.capability", &attribute, flags).unwrap();
        let parts = ["has file capabilities", "setcap -r", "AmbientCapabilities"];
        assert_eq!(check(&parts), ignored, "{words:x?}");
    }
}

#[test]
fn launchers_that_drop_the_environment_belong_in_front() {
    let folder = Folder::new();
    let static_ = folder.program("gosu", &["-static"]);
    folder.refuses(&static_, 1, &["gosu … ppv2-proxy wrap … -- PROGRAM"]);
    let sudo = folder.program("sudo", &[]);
    folder.refuses(&sudo, 1, &["sudo … ppv2-proxy wrap … -- PROGRAM"]);
    let service = folder.program("systemctl", &[]);
    folder.refuses(&service, 1, &["in the unit or the image"]);
    let command = &mut folder.wrap(&[], &words(&["env", "-i", "true"]));
    refused(command, 1, &["env … ppv2-proxy wrap … -- PROGRAM"]);
    let command = &mut folder.wrap(&[], &words(&["env", "A=1", "sh", "-c", "exit 7"]));
    assert_eq!(output_of(command), (Some(7), String::new(), String::new()));
}

#[test]
fn an_app_image_is_to_be_extracted() {
    let folder = Folder::new();
    let mut image = fs::read(folder.program("program", &["-static"])).unwrap();
    image[8..11].copy_from_slice(b"AI\x02");
    let image = folder.file("server.AppImage", &image);
    folder.refuses(&image, 1, &["is an AppImage", "--appimage-extract"]);
}

#[test]
fn a_library_that_is_none_is_named() {
    let folder = Folder::new();
    let library = folder.path("libppv2_preload.so");
    let true_ = words(&["true"]);
    fs::write(&library, "text").unwrap();
    refused(
        &mut folder.wrap(&[], &true_),
        1,
        &["libppv2_preload.so\" is no shared library"],
    );
    fs::remove_file(&library).unwrap();
    refused(
        &mut folder.wrap(&[], &true_),
        1,
        &["libppv2_preload.so\" can't be read", "No such file"],
    );
    fs::rename(folder.program("program", &[]), &library).unwrap();
    refused(
        &mut folder.wrap(&[], &true_),
        1,
        &["libppv2_preload.so\" is no shared library"],
    );
}

#[test]
fn the_library_is_looked_for_beside_the_program_first() {
    let folder = Folder::new();
    for name in ["bin", "lib", "lib/ppv2"] {
        fs::create_dir(folder.path(name)).unwrap();
    }
    let library = folder.path("libppv2_preload.so");
    let [beside, below] =
        ["bin", "lib/ppv2"].map(|place| folder.path(place).join("libppv2_preload.so"));
    for place in [&beside, &below] {
        fs::copy(&library, place).unwrap();
    }
    let proxy = folder.path("bin/ppv2-proxy");
    install(binary(), &proxy);
    // By whatever name it is started.
    let link = folder.path("link");
    std::os::unix::fs::symlink(&proxy, &link).unwrap();
    let print_env = || {
        let mut command = Command::new(&link);
        command.args(["wrap", "--trusted", "192.0.2.1", "--print-env"]);
        command.env_remove("LD_PRELOAD");
        let (code, out, error) = output_of(&mut command);
        assert_eq!(code, Some(0), "{error}");
        out
    };
    for place in [beside, below] {
        let expected = format!("LD_PRELOAD={}\nPPV2_TRUSTED=192.0.2.1\n", place.display());
        assert_eq!(print_env(), expected);
        fs::remove_file(place).unwrap();
    }
}

/// Programs that use musl have a library of their own.
#[test]
fn the_library_is_chosen_by_the_programs_c_library() {
    let folder = Folder::new();
    for name in ["bin", "lib", "lib/ppv2"] {
        fs::create_dir(folder.path(name)).unwrap();
    }
    let proxy = folder.path("bin/ppv2-proxy");
    install(binary(), &proxy);
    let for_glibc = folder.path("lib/ppv2/libppv2_preload.so");
    fs::copy(folder.path("libppv2_preload.so"), &for_glibc).unwrap();
    let for_musl = folder.compile_by(
        musl_gcc(),
        "lib/ppv2/libppv2_preload_musl.so",
        "int nothing;",
        &["-shared", "-fPIC"],
    );
    let source = "int main(void) { return 7; }";
    let musl = folder.compile_by(musl_gcc(), "musl", source, &[]);
    let glibc = folder.program("glibc", &[]);
    let script = |name, interpreter: &Path| {
        folder.file(name, format!("#!{}\n", interpreter.display()).as_bytes())
    };
    let (musl_script, glibc_script) = (script("of-musl", &musl), script("of-glibc", &glibc));
    let no_format = folder.file("script", b"exit 7\n");
    let linker = format!("/lib/ld-musl-{}.so.1", std::env::consts::ARCH);
    let wrap = |program: &[&Path]| {
        let mut command = Command::new(&proxy);
        command.args(["wrap", "--trusted", "192.0.2.1", "--"]);
        command.args(program).env_remove("LD_PRELOAD");
        command
    };
    for (program, library) in [
        (&[&*glibc][..], &for_glibc),
        (&[&glibc_script], &for_glibc),
        (&[&no_format], &for_glibc),
        (&[&musl], &for_musl),
        (&[&musl_script], &for_musl),
        (&[Path::new(&linker), &musl], &for_musl),
    ] {
        let mut print = Command::new(&proxy);
        print.args(["wrap", "--trusted", "192.0.2.1", "--print-env", "--"]);
        print.args(program).env_remove("LD_PRELOAD");
        let expected = format!("LD_PRELOAD={}\nPPV2_TRUSTED=192.0.2.1\n", library.display());
        assert_eq!(output_of(&mut print), (Some(0), expected, String::new()));
        let (code, _, error) = output_of(&mut wrap(program));
        assert_eq!((code, error.as_str()), (Some(7), ""), "{program:?}");
    }

    // Without one of them, programs with the other C library run on.
    fs::remove_file(&for_musl).unwrap();
    let lib = folder.path("lib/ppv2").display().to_string();
    let missing = "the preload library for it, libppv2_preload_musl.so, is not in ";
    let parts = [
        "musl\" uses musl as its C library",
        missing,
        &lib,
        "--library",
    ];
    refused(&mut wrap(&[&musl_script]), 1, &parts);
    assert_eq!(output_of(&mut wrap(&[&glibc])).0, Some(7));
    // The library of the other one, named by hand.
    let parts = [
        "musl\" uses musl as its C library",
        "is built for glibc",
        "for musl with --library",
    ];
    folder.refuses(&musl, 1, &parts);
}

#[test]
fn the_environment_is_printed_for_units_containers_and_shells() {
    let folder = Folder::new();
    let print_env = |library: &str, more: &[&str]| {
        let mut command = Command::new(binary());
        command.args([
            "wrap",
            "--print-env",
            "--trusted",
            "192.0.2.1",
            "--library",
            library,
        ]);
        command.args(more).env_remove("LD_PRELOAD");
        let output = command.output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), error.as_str()), (Some(0), ""));
        output.stdout
    };
    // For another host, nothing of this one is looked at.
    let lines = print_env(
        "/usr/lib/elsewhere/libppv2_preload.so",
        &["--stats", "/none/nsd.prom"],
    );
    let expected = "LD_PRELOAD=/usr/lib/elsewhere/libppv2_preload.so\nPPV2_TRUSTED=192.0.2.1\n\
                    PPV2_STATS=/none/nsd.prom\n";
    assert_eq!(String::from_utf8(lines).unwrap(), expected);

    // Lists may be written as the variables have them.
    let mut more = vec![
        "--trusted",
        "192.0.2.2,2001:db8::/32",
        "--only",
        "53,5000-5010",
    ];
    more.extend(["--peer", "10.0.0.1,10.0.0.2", "--format", "v2,spp"]);
    let lines = print_env("/usr/lib/elsewhere/libppv2_preload.so", &more);
    let expected = "LD_PRELOAD=/usr/lib/elsewhere/libppv2_preload.so\n\
                    PPV2_TRUSTED=192.0.2.1,192.0.2.2,2001:db8::/32\n\
                    PPV2_ONLY=53,5000-5010\nPPV2_PEERS=10.0.0.1,10.0.0.2\nPPV2_FORMATS=v2,spp\n";
    assert_eq!(String::from_utf8(lines).unwrap(), expected);

    // A shell reads what it needs quotes for, as the program would get it.
    let odd = folder.path("a b'\"$HOME`\\\u{e9}.prom");
    let library = folder.path("libppv2_preload.so");
    let mut more = vec!["--stats", odd.to_str().unwrap()];
    let lines = print_env(library.to_str().unwrap(), &more);
    let file = folder.file("environment", &lines);
    let mut shell = Command::new("sh");
    shell
        .args(["-ec", "set -a; . \"$0\"; exec env -0"])
        .arg(&file);
    let read = shell.output().unwrap().stdout;
    let variables: Vec<_> = read.split(|byte| *byte == 0).collect();
    let stats = [&b"PPV2_STATS="[..], &OsString::from(&odd).into_vec()].concat();
    assert!(variables.contains(&stats.as_slice()), "{variables:?}");

    // With a program, it is checked as if it were run.
    more.extend(["--", "true"]);
    assert_eq!(print_env(library.to_str().unwrap(), &more), lines);
    let program = folder.program("static", &["-static"]);
    let mut command = folder.wrap(&["--print-env"], &[program.as_os_str()]);
    refused(&mut command, 1, &["is linked statically"]);
}

/// Both read the options, each by its own code.
#[test]
fn the_library_takes_what_wrap_gives_it() {
    let folder = Folder::new();
    let stats = folder.path("stats.prom");
    let every: [&[&str]; 2] = [
        &[
            "--trusted=2001:db8::/64",
            "--trusted=198.51.100.0/24",
            "--only=53",
            "--only=5000-5010",
            "--only=192.0.2.7",
            "--only=::1",
            "--only=[::2]",
            "--only=192.0.2.1:53",
            "--only=[::]:5060",
            "--only=[2001:db8::1]:1-9",
            "--only=::ffff:192.0.2.9",
            "--untrusted=accept",
            "--peer=192.0.2.9",
            "--peer=2001:db8:1::/48",
            "--format=spp",
            "--format=v2",
            "--forget-after=1500ms",
            "--max-clients=1000",
            "--pktinfo=destination",
        ],
        &["--remember=1m 30s", "--forget-after=1day"],
    ];
    for options in every {
        let mut command = Command::new(binary());
        command.args(["wrap", "--trusted=192.0.2.1", "--library"]);
        command.arg(preload_library()).args(options);
        command.arg("--stats").arg(&stats).args(["--", "true"]);
        assert_eq!(
            output_of(&mut command),
            (Some(0), String::new(), String::new())
        );
        let text = fs::read_to_string(&stats).unwrap();
        assert!(
            text.contains("# TYPE ppv2_preload_clients gauge\n"),
            "{text}"
        );
    }

    // As with `--print-env` and a variable that somebody has edited.
    let mut command = Command::new("true");
    command.env("LD_PRELOAD", preload_library());
    command.env("PPV2_TRUSTED", "192.0.2.300");
    let (code, _, error) = output_of(&mut command);
    assert_eq!(code, Some(2), "{error}");
    assert!(error.contains("PPV2_TRUSTED=\"192.0.2.300\""), "{error}");
}
