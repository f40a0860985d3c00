//! The configurations that operators are shown can be run as they stand.

use std::fs;
use std::path::{Path, PathBuf};

use ppv2_lab::namespace::enter;
use ppv2_lab::*;

fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(folder);
    let files = fs::read_dir(folder).unwrap();
    files
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect()
}

/// Asserts that `check` finds nothing wrong and nothing to warn of.
fn is_sound(name: &str, file: &Path) {
    let (code, report, error) = output(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{name}: {error}");
    assert!(report.starts_with("listener "), "{name}: {report}");
    assert!(!report.contains("warning"), "{name}: {report}");
}

#[test]
fn every_configuration_is_sound() {
    let files = files("examples/configurations", "toml");
    assert!(files.len() >= 5, "{files:?}");
    for file in files {
        is_sound(&file.display().to_string(), &file);
    }
}

#[test]
fn every_mode_is_sound_after_its_commands() {
    // Interfaces, without addresses.
    let interfaces = "ip link add eth0 type veth peer name pub
        ip link add priv type veth peer name other";
    if !enter(test_name!(), interfaces) {
        return;
    }
    let pages = files("docs/guides/modes", "md");
    assert_eq!(pages.len(), 4);
    let folder = tempfile::tempdir().unwrap();
    for page in pages {
        let name = page.display().to_string();
        let text = fs::read_to_string(&page).unwrap();
        let (_, block) = text.split_once("```toml\n").unwrap();
        let (config, _) = block.split_once("```").unwrap();
        let file = write(&folder, "proxy.toml", config);
        is_sound(&name, &file);

        // The commands of the page, on a host that has none of its addresses.
        let setups = text
            .lines()
            .filter_map(|line| line.strip_prefix("ppv2-proxy host-setup "));
        let mut printed = 0;
        for setup in setups {
            let setup = setup.split_once(" >").unwrap().0;
            let mut arguments = vec!["host-setup"];
            arguments.extend(setup.split(' '));
            let known: [(&str, &str); 3] = [
                ("--public-interface", "pub"),
                ("--server-interface", "priv"),
                ("--server", "10.0.0.2"),
            ];
            for (option, value) in known {
                let is_of_server = option == "--server";
                if !arguments.contains(&option) && (!is_of_server || setup.contains("role server"))
                {
                    arguments.extend([option, value]);
                }
            }
            let at = arguments.iter().position(|word| *word == "proxy.toml");
            arguments[at.unwrap()] = file.to_str().unwrap();
            for undo in [false, true] {
                let mut arguments = arguments.clone();
                arguments.extend(undo.then_some("--undo"));
                let (code, script, error) = output(&arguments);
                assert_eq!(code, Some(0), "{name}: {arguments:?}: {error}");
                assert!(script.starts_with("#!/bin/sh\n"), "{script}");
                printed += 1;
            }
        }
        assert!(printed >= 2, "{name}");
    }
}
