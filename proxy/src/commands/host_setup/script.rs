//! The shell script: what it begins with, how it keeps what it changes, and its
//! reverse. It belongs to no mode.

use std::fmt::Write as _;

use super::Role;

/// The nft table of the proxy's host. Nothing else is ever put into it.
pub const PROXY_NFT_TABLE: &str = "ppv2_dsr";
/// The nft table of a server's host.
pub const SERVER_NFT_TABLE: &str = "ppv2_dsr_server";

const WIDTH: usize = 78;

/// Undoes what is noted. Notes stand in `$state`, a line for each thing: its kind,
/// which one, and what it was. A thing is noted before it is changed, and the notes
/// go when all of them are undone, so neither script has a point at which it must
/// not be interrupted.
const UNDO: &str = r#"# Undoes what is noted, the latest first. Parameters and addresses may be gone.
undo() {
    [ -e "$state" ] || return 0
    notes=$(tac "$state")
    failed=
    while read -r kind what value; do
        case $kind in
        parameter)
            [ ! -e "/proc/sys/$what" ] || echo "$value" >"/proc/sys/$what" || failed=1 ;;
        address)
            [ -z "$(ip addr show dev lo to "$what")" ] || ip addr del "$what" dev lo || failed=1 ;;
        table)
            for family in -4 -6; do
                while ip $family rule del pref "$what" 2>/dev/null; do :; done
                ip $family route flush table "$what" 2>/dev/null || :
            done ;;
        nft)
            ! nft list table inet "$what" >/dev/null 2>&1 || nft delete table inet "$what" || failed=1 ;;
        esac
    done <<END
$notes
END
    [ -z "$failed" ]
    rm "$state"
}
"#;

const USE_TABLE: &str = r#"# Notes a routing table and the preference of its rules, which must be unused.
use_table() {
    for family in -4 -6; do
        if ip $family rule | grep "^$1:" || ip $family route show table "$1" 2>/dev/null | grep .; then
            echo "routing table $1, or the preference $1 of rules, is in use: print this script with another --table" >&2
            exit 1
        fi
    done
    echo "table $1" >>"$state"
}
"#;

const SET_PARAMETER: &str = r#"# Notes the value of a kernel parameter, unless it is noted already.
keep() {
    if ! grep -qsF "parameter $1 " "$state"; then
        value=$(cat "/proc/sys/$1")
        echo "parameter $1 $value" >>"$state"
    fi
}

# Sets a kernel parameter.
set_parameter() {
    keep "$1"
    echo "$2" >"/proc/sys/$1"
}
"#;

const ADD_ADDRESS: &str = r#"# Gives lo an address that it doesn't have.
add_address() {
    if [ -z "$(ip addr show dev lo to "$1")" ]; then
        echo "address $1" >>"$state"
        ip addr add "$1" dev lo
    fi
}
"#;

/// Forwarding of IPv6 is one parameter for all interfaces. Setting it sets every
/// interface's own, which are therefore noted before and restored after it.
const FORWARD_V6: &str = r#"for file in /proc/sys/net/ipv6/conf/*/forwarding; do
    [ "$file" = /proc/sys/net/ipv6/conf/all/forwarding ] || keep "${file#/proc/sys/}"
done
set_parameter net/ipv6/conf/all/forwarding 1
"#;

/// A script that grows by comments and commands.
pub(super) struct Script {
    role: Role,
    number: u32,
    /// Whether there are rules or routes.
    uses_table: bool,
    body: String,
    nft: String,
}

impl Script {
    pub(super) fn new(role: Role, table: Option<u32>) -> Self {
        Self {
            role,
            number: table.unwrap_or(role.table()),
            uses_table: false,
            body: String::new(),
            nft: String::new(),
        }
    }

    fn nft_table(&self) -> &'static str {
        match self.role {
            Role::Proxy => PROXY_NFT_TABLE,
            Role::Server => SERVER_NFT_TABLE,
        }
    }

    /// Begins a part, whose purpose the comment says.
    pub(super) fn comment(&mut self, text: &str) {
        self.body.push('\n');
        self.body.push_str(&comment(text));
    }

    pub(super) fn command(&mut self, line: &str) {
        let _ = writeln!(self.body, "{line}");
    }

    /// A routing rule that looks up this script's table.
    pub(super) fn rule(&mut self, v4: bool, what: &str) {
        let number = self.number;
        self.rule_to(v4, what, &number.to_string());
    }

    /// A routing rule that looks up another table.
    pub(super) fn rule_to(&mut self, v4: bool, what: &str, table: &str) {
        let (family, number) = (family(v4), self.number);
        self.uses_table = true;
        self.command(&format!(
            "ip {family} rule add pref {number} {what} lookup {table}"
        ));
    }

    /// A route in this script's table.
    pub(super) fn route(&mut self, v4: bool, what: &str) {
        let (family, number) = (family(v4), self.number);
        self.uses_table = true;
        self.command(&format!("ip {family} route replace {what} table {number}"));
    }

    /// Sets an interface's kernel parameter.
    pub(super) fn parameter(&mut self, v4: bool, interface: &str, name: &str, value: u32) {
        let key = parameter(v4, interface, name);
        self.command(&format!("set_parameter {key} {value}"));
    }

    /// Turns forwarding of IPv6 on; `public` is the interface that this host may
    /// have its own default route from.
    pub(super) fn forward_v6(&mut self, public: Option<&str>) {
        if let Some(public) = public {
            let key = parameter(false, public, "accept_ra");
            self.command(
                "# A host that forwards no longer heeds router advertisements, unless told to.",
            );
            self.command(&format!(
                "[ \"$(cat /proc/sys/{key})\" != 1 ] || set_parameter {key} 2"
            ));
        }
        self.body.push_str(FORWARD_V6);
    }

    pub(super) fn address(&mut self, network: &str) {
        self.command(&format!("add_address {network}"));
    }

    /// The chains of this script's nft table, with the comment above it.
    pub(super) fn nft(&mut self, text: &str, chains: &[Chain]) {
        let table = self.nft_table();
        let mut nft = comment(text);
        let _ = writeln!(nft, "echo \"nft {table}\" >>\"$state\"");
        // One transaction, which replaces a table of this name.
        let _ = writeln!(nft, "nft -f - <<'END'\ntable inet {table}");
        let _ = writeln!(nft, "delete table inet {table}\ntable inet {table} {{");
        for Chain { name, hook, rules } in chains {
            let _ = writeln!(nft, "    chain {name} {{\n        type filter hook {hook}");
            for rule in rules {
                let _ = writeln!(nft, "        {rule}");
            }
            nft.push_str("    }\n");
        }
        nft.push_str("}\nEND\n");
        self.nft = nft;
    }

    fn state(&self) -> String {
        format!("state=/run/ppv2-host-setup-{}\n", self.role.name())
    }

    fn opening(&self, what: &str) -> String {
        let role = self.role.name();
        let whose = match self.role {
            Role::Proxy => "the host of ppv2-proxy",
            Role::Server => "a server's host",
        };
        let text = format!(
            "{what} {whose}: printed by `ppv2-proxy host-setup --role {role}`, to be run there as root."
        );
        format!("#!/bin/sh\n{}", comment(&text))
    }

    /// The script.
    pub(super) fn set_up(&self) -> String {
        let mut text = self.opening("Sets up");
        text.push_str(&comment(
            "Running it again has the same result. It lasts until the host is restarted. With --undo the reverse is printed.",
        ));
        let _ = write!(text, "set -eu\n{}\n{UNDO}", self.state());
        let used = |word: &str| self.body.lines().any(|line| line.contains(word));
        for (is_used, function) in [
            (self.uses_table, USE_TABLE),
            (used("set_parameter "), SET_PARAMETER),
            (used("add_address "), ADD_ADDRESS),
        ] {
            if is_used {
                let _ = write!(text, "\n{function}");
            }
        }
        text.push('\n');
        text.push_str(&comment(
            "What an earlier run changed is undone first: replies stop for a moment.",
        ));
        text.push_str("undo\n");
        if self.uses_table {
            let _ = writeln!(text, "use_table {}", self.number);
        }
        text.push_str(&self.body);
        if !self.nft.is_empty() {
            let _ = write!(text, "\n{}", self.nft);
        }
        text
    }

    /// The reverse, whatever was set up.
    pub(super) fn undo(&self) -> String {
        let mut text = self.opening("Undoes what was set up on");
        let _ = write!(text, "set -eu\n{}\n{UNDO}\nundo\n", self.state());
        text
    }
}

/// A chain of the nft table.
pub(super) struct Chain {
    pub(super) name: &'static str,
    /// Hook and priority.
    pub(super) hook: &'static str,
    pub(super) rules: Vec<String>,
}

fn family(v4: bool) -> &'static str {
    if v4 { "-4" } else { "-6" }
}

/// An interface's parameter, by its path below /proc/sys.
fn parameter(v4: bool, interface: &str, name: &str) -> String {
    let family = if v4 { "ipv4" } else { "ipv6" };
    format!("net/{family}/conf/{interface}/{name}")
}

fn comment(text: &str) -> String {
    let mut lines = String::new();
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            let _ = writeln!(lines, "{line}");
            line = String::from("#");
        }
        let _ = write!(line, " {word}");
    }
    let _ = writeln!(lines, "{line}");
    lines
}
