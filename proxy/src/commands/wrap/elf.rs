//! What an ELF file says about how it is loaded: elf(5).

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::ops::Range;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use object::elf::{self, FileHeader32, FileHeader64, Machine};
use object::read::elf::{Dyn as _, FileHeader, ProgramHeader as _};
use object::{Endianness, ReadCache, ReadRef};

/// Where the class stands, behind the magic bytes.
const CLASS: usize = 4;

/// Where an AppImage says that it is one, and what: in bytes that ELF leaves unused.
const APP_IMAGE: Range<usize> = 8..10;
const APP_IMAGE_MAGIC: &[u8] = b"AI";

/// The most bytes of a name that are read.
const MAX_NAME: u64 = 4096;

/// The facts of a program or a library that decide whether one can be loaded into the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Elf {
    pub(super) machine: Architecture,
    kind: elf::FileType,
    /// The dynamic linker that the kernel starts.
    pub(super) interpreter: Option<PathBuf>,
    /// The name by which others need it, or that of the file: musl's own has none in some
    /// distributions.
    name: Option<String>,
    /// The libraries that it needs.
    needed: Vec<String>,
    /// Whether it was linked by Go's tools.
    pub(super) is_go: bool,
    /// Whether it is followed by the files that it unpacks.
    pub(super) is_app_image: bool,
}

/// For which processor and which size of pointers a file was built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Architecture {
    machine: Machine,
    is_64: bool,
    is_little: bool,
}

/// A C library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Libc {
    /// The GNU C library.
    Glibc,
    /// That of Alpine.
    Musl,
    /// That of Android.
    Bionic,
}

/// Reads what a file says, or nothing if it is no ELF file.
pub(super) fn read(path: &Path) -> io::Result<Option<Elf>> {
    let mut file = File::open(path)?;
    let mut start = [0; APP_IMAGE.end];
    match file.read_exact(&mut start) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    file.rewind()?;
    // Only what is asked for is read: a program may have hundreds of megabytes.
    let data = &ReadCache::new(file);
    let parsed = match start[CLASS] {
        _ if start[..CLASS] != elf::ELFMAG => return Ok(None),
        class if class == elf::ELFCLASS32.0 => parse::<FileHeader32<Endianness>, _>(data),
        class if class == elf::ELFCLASS64.0 => parse::<FileHeader64<Endianness>, _>(data),
        _ => return Ok(None),
    };
    let mut parsed = parsed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    if parsed.name.is_none() {
        let name = path.file_name().map(OsStr::to_string_lossy);
        parsed.name = name.map(Cow::into_owned);
    }
    parsed.is_app_image = start[APP_IMAGE] == *APP_IMAGE_MAGIC;
    Ok(Some(parsed))
}

fn parse<'data, Header, R>(data: R) -> object::Result<Elf>
where
    Header: FileHeader<Endian = Endianness>,
    R: ReadRef<'data>,
{
    let header = Header::parse(data)?;
    let endian = header.endian()?;
    let segments = header.program_headers(endian, data)?;
    let mut elf = Elf {
        machine: Architecture {
            machine: header.e_machine(endian),
            is_64: header.is_class_64(),
            is_little: endian == Endianness::Little,
        },
        kind: header.e_type(endian),
        interpreter: None,
        name: None,
        needed: Vec::new(),
        is_go: false,
        is_app_image: false,
    };
    for segment in segments {
        if let Some(interpreter) = segment.interpreter(endian, data)? {
            elf.interpreter = Some(OsString::from_vec(interpreter.to_vec()).into());
        }
        let Some(entries) = segment.dynamic(endian, data)? else {
            continue;
        };
        let value = |tag| {
            let mut values = entries.iter().filter(move |entry| entry.tag(endian) == tag);
            values.next().map(|entry| entry.val(endian))
        };
        let Some(names) = value(elf::DT_STRTAB) else {
            continue;
        };
        // Of the addresses in memory, each segment has a part.
        let name = |offset: u64| {
            let address = names.checked_add(offset)?;
            let mut parts = segments
                .iter()
                .filter(|part| part.p_type(endian) == elf::PT_LOAD)
                .filter_map(|part| {
                    let start: u64 = part.p_vaddr(endian).into();
                    let size: u64 = part.p_filesz(endian).into();
                    let within = address.checked_sub(start).filter(|at| *at < size)?;
                    let in_file: u64 = part.p_offset(endian).into();
                    Some((in_file.checked_add(within)?, size - within))
                });
            let (at, left) = parts.next()?;
            let end = at.checked_add(left.min(MAX_NAME))?;
            let bytes = data.read_bytes_at_until(at..end, 0).ok()?;
            Some(String::from_utf8_lossy(bytes).into_owned())
        };
        let needed = entries
            .iter()
            .filter(|entry| entry.tag(endian) == elf::DT_NEEDED);
        elf.needed = needed.filter_map(|entry| name(entry.val(endian))).collect();
        elf.name = value(elf::DT_SONAME).and_then(name);
    }
    elf.is_go = is_go(header, endian, data);
    Ok(elf)
}

/// Whether the file has the sections that Go's linker writes, which stay when symbols are
/// stripped. A file without sections says nothing.
fn is_go<'data, Header, R>(header: &Header, endian: Endianness, data: R) -> bool
where
    Header: FileHeader<Endian = Endianness>,
    R: ReadRef<'data>,
{
    let Ok(sections) = header.sections(endian, data) else {
        return false;
    };
    let mut names = sections
        .iter()
        .filter_map(|section| sections.section_name(endian, section).ok());
    names.any(|name| matches!(name, b".go.buildinfo" | b".note.go.buildid"))
}

impl Elf {
    /// Whether it can be loaded into a program.
    pub(super) fn is_library(&self) -> bool {
        self.kind == elf::ET_DYN && self.interpreter.is_none()
    }

    /// Whether the kernel can start it.
    pub(super) fn is_program(&self) -> bool {
        matches!(self.kind, elf::ET_EXEC | elf::ET_DYN)
    }

    /// Whether it is a dynamic linker itself, which loads the program among its arguments.
    pub(super) fn is_dynamic_linker(&self) -> bool {
        self.interpreter.is_none() && self.libc_of_own_name().is_some()
    }

    fn libc_of_own_name(&self) -> Option<Libc> {
        libc_of_linker(self.name.as_deref()?)
    }

    /// The C library that comes with a program's dynamic linker, or that a library needs.
    pub(super) fn libc(&self) -> Option<Libc> {
        if let Some(interpreter) = &self.interpreter {
            return libc_of_linker(interpreter.file_name()?.to_str()?);
        }
        let needed = self.needed.iter().find_map(|name| match name.as_str() {
            "libc.so.6" => Some(Libc::Glibc),
            "libc.so" => Some(Libc::Musl),
            name if name.starts_with("libc.musl-") => Some(Libc::Musl),
            _ => None,
        });
        needed.or_else(|| self.libc_of_own_name())
    }

    /// Whether it needs a library of this name, in any version.
    pub(super) fn needs(&self, library: &str) -> bool {
        let is_it = |name: &String| {
            let version = name.strip_prefix(library);
            version.is_some_and(|rest| rest == ".so" || rest.starts_with(".so."))
        };
        self.needed.iter().any(is_it)
    }
}

fn libc_of_linker(name: &str) -> Option<Libc> {
    match name {
        "linker" | "linker64" => Some(Libc::Bionic),
        name if name.starts_with("ld-musl-") => Some(Libc::Musl),
        // The same file: musl is one for both.
        "libc.so" => Some(Libc::Musl),
        name if name.starts_with("libc.musl-") => Some(Libc::Musl),
        name if name.starts_with("ld-linux") || name.starts_with("ld64.so") => Some(Libc::Glibc),
        "ld.so.1" => Some(Libc::Glibc),
        _ => None,
    }
}

impl fmt::Display for Libc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Glibc => "glibc",
            Self::Musl => "musl",
            Self::Bionic => "Android's libc",
        })
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match (self.machine, self.is_64) {
            (elf::EM_X86_64, true) => "x86-64",
            (elf::EM_X86_64, false) => "x32",
            (elf::EM_386, _) => "32-bit x86",
            (elf::EM_AARCH64, true) => "64-bit ARM",
            (elf::EM_ARM, _) => "32-bit ARM",
            (elf::EM_RISCV, true) => "64-bit RISC-V",
            (elf::EM_PPC64, _) => "64-bit POWER",
            (elf::EM_S390, true) => "s390x",
            (machine, is_64) => {
                let bits = if is_64 { 64 } else { 32 };
                return write!(f, "processor {} of elf(5) with {bits} bits", machine.0);
            }
        };
        let order = match (self.machine, self.is_little) {
            (elf::EM_S390, _) | (_, true) => "",
            (_, false) => ", big-endian",
        };
        write!(f, "{name}{order}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_itself_is_a_program_of_this_machine() {
        let elf = read(&std::env::current_exe().unwrap()).unwrap().unwrap();
        assert!(elf.is_program() && !elf.is_library() && !elf.is_dynamic_linker());
        assert!(!elf.is_go);
        assert_eq!(elf.libc(), Some(Libc::Glibc));
        assert!(elf.needs("libc") && !elf.needs("lib"), "{elf:?}");
        let linker = read(elf.interpreter.as_deref().unwrap()).unwrap().unwrap();
        assert!(linker.is_dynamic_linker(), "{linker:?}");
        assert_eq!(linker.machine, elf.machine);
    }

    #[test]
    fn other_files_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        for content in [
            &b""[..],
            b"#!",
            b"#!/bin/sh\n",
            b"\x7fELF",
            b"\x7fELF\x03\x01\x01",
        ] {
            std::fs::write(&file, content).unwrap();
            assert_eq!(read(&file).unwrap(), None, "{content:?}");
        }
    }

    /// The operator who wraps a file may not have written it.
    #[test]
    fn damaged_files_are_errors_or_facts() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let start = &own[..own.len().min(2048)];
        for len in (0..start.len()).step_by(97) {
            std::fs::write(&file, &start[..len]).unwrap();
            let _ = read(&file);
        }
        for at in 4..256.min(start.len()) {
            for value in [1, 0xff] {
                let mut damaged = start.to_vec();
                damaged[at] = value;
                std::fs::write(&file, &damaged).unwrap();
                let _ = read(&file);
            }
        }
    }

    #[test]
    fn dynamic_linkers_are_known_by_name() {
        for (name, libc) in [
            ("ld-linux-x86-64.so.2", Some(Libc::Glibc)),
            ("ld-linux.so.2", Some(Libc::Glibc)),
            ("ld64.so.2", Some(Libc::Glibc)),
            ("ld-musl-x86_64.so.1", Some(Libc::Musl)),
            ("libc.musl-x86_64.so.1", Some(Libc::Musl)),
            ("libc.so", Some(Libc::Musl)),
            ("libc.so.6", None),
            ("linker64", Some(Libc::Bionic)),
            ("ld-uClibc.so.0", None),
        ] {
            assert_eq!(libc_of_linker(name), libc, "{name}");
        }
    }
}
