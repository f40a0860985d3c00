//! The shell script: what it begins with, how it keeps what it changes, and its
//! reverse. It belongs to no mode.

use std::fmt::Write as _;

use super::Role;

/// The nft table of the proxy's host. Nothing else is ever put into it.
pub const PROXY_NFT_TABLE: &str = "ppv2_dsr";
/// The nft table of a server's host.
pub const SERVER_NFT_TABLE: &str = "ppv2_dsr_server";

const WIDTH: usize = 78;

const KEEP: &str = r#"# Keeps a kernel parameter's value, for the reverse, unless it is kept already.
keep() {
    grep -qs "^$1 = " "$state" || echo "$1 = $(sysctl -n "$1")" >>"$state"
}

# Sets a kernel parameter.
set_parameter() {
    keep "$1"
    sysctl -q -w "$1=$2"
}
"#;

const KEEP_ADDRESS: &str = r#"# Gives lo an address, and keeps a note of it for the reverse.
add_address() {
    if [ -z "$(ip addr show dev lo to "$1")" ]; then
        ip addr add "$1" dev lo
        echo "$1" >>"$state.addresses"
    fi
}
"#;

/// Forwarding of IPv6 is one parameter for all interfaces, and turning it on
/// changes every interface's own.
const FORWARD_V6: &str = r#"if ! grep -qs "^net.ipv6.conf.all.forwarding = " "$state"; then
    keep net.ipv6.conf.all.forwarding
    for key in $(sysctl -N -a 2>/dev/null | grep '^net\.ipv6\.conf\..*\.forwarding$'); do
        keep "$key"
    done
fi
set_parameter net.ipv6.conf.all.forwarding 1
"#;

/// A script that grows by comments and commands.
pub(super) struct Script {
    role: Role,
    number: u32,
    body: String,
    nft: String,
}

impl Script {
    pub(super) fn new(role: Role, table: Option<u32>) -> Self {
        Self {
            role,
            number: table.unwrap_or(role.table()),
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
        self.command(&format!(
            "ip {family} rule add pref {number} {what} lookup {table}"
        ));
    }

    /// A route in this script's table.
    pub(super) fn route(&mut self, v4: bool, what: &str) {
        let (family, number) = (family(v4), self.number);
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
                "[ \"$(sysctl -n {key})\" != 1 ] || set_parameter {key} 2"
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
        // One transaction: the table is replaced, never missing.
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
        format!("state=/run/ppv2-host-setup-{}", self.role.name())
    }

    /// Commands that remove rules, routes and, unless it is replaced, the nft table.
    fn clear(&self, keeps_nft: bool) -> String {
        let (number, table) = (self.number, self.nft_table());
        let mut text = format!(
            "for family in -4 -6; do\n    \
             while ip $family rule del pref {number} 2>/dev/null; do :; done\n    \
             ip $family route flush table {number} 2>/dev/null || :\ndone\n"
        );
        if !keeps_nft {
            let _ = write!(
                text,
                "if nft list table inet {table} >/dev/null 2>&1; then\n    \
                 nft delete table inet {table}\nfi\n"
            );
        }
        text
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
            "Running it again changes nothing more. It lasts until the host is restarted. With --undo the reverse is printed.",
        ));
        text.push_str("set -eu\n");
        let sets = self.body.contains("set_parameter ");
        let adds = self.body.contains("add_address ");
        if sets || adds {
            let _ = writeln!(text, "{}", self.state());
        }
        for (is_used, function) in [(sets, KEEP), (adds, KEEP_ADDRESS)] {
            if is_used {
                let _ = write!(text, "\n{function}");
            }
        }
        text.push('\n');
        text.push_str(&comment(&format!(
            "Rules of preference {}, and the routing table of that number, are this script's alone: what an earlier run left there is replaced.",
            self.number
        )));
        text.push_str(&self.clear(!self.nft.is_empty()));
        text.push_str(&self.body);
        if !self.nft.is_empty() {
            let _ = write!(text, "\n{}", self.nft);
        }
        text
    }

    /// The reverse, whatever was set up.
    pub(super) fn undo(&self) -> String {
        let mut text = self.opening("Undoes what was set up on");
        let _ = write!(text, "set -eu\n{}\n\n", self.state());
        text.push_str(&self.clear(false));
        text.push('\n');
        text.push_str(&comment("Kernel parameters, as they were."));
        text.push_str(
            "if [ -e \"$state\" ]; then\n    sysctl -e -q -p \"$state\"\n    rm \"$state\"\nfi\n",
        );
        if self.role == Role::Server {
            text.push('\n');
            text.push_str(&comment("Addresses that lo was given."));
            text.push_str(
                "if [ -e \"$state.addresses\" ]; then\n    \
                 while read -r address; do\n        \
                 ip addr del \"$address\" dev lo || :\n    \
                 done <\"$state.addresses\"\n    rm \"$state.addresses\"\nfi\n",
            );
        }
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

/// The name of an interface's parameter for sysctl(8), which separates by slashes
/// where a name has a dot of its own.
fn parameter(v4: bool, interface: &str, name: &str) -> String {
    let family = if v4 { "ipv4" } else { "ipv6" };
    let separator = if interface.contains('.') { "/" } else { "." };
    ["net", family, "conf", interface, name].join(separator)
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
