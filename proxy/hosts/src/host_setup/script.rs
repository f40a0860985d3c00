//! The shell script: how it records and reverts its changes. It knows no mode.

use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;

use super::Role;

const WIDTH: usize = 78;

/// Reverts the recorded changes. `$state` has a line for each: its kind, the thing, and
/// its former value. A change is recorded before it is made, and the record is deleted
/// when all of them are reverted, so both scripts may be interrupted at any point.
const UNDO: &str = r#"# Reverts the recorded changes, the latest first. Parameters and addresses may be gone.
undo() {
    [ -e "$state" ] || return 0
    records=$(tac "$state")
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
        route)
            ip $what route del local "$value" dev lo 2>/dev/null || [ -z "$(ip $what route show table local "$value" type local dev lo)" ] || failed=1 ;;
        via)
            set -- $value
            ip $what route del "$1" via "$2" dev "$3" 2>/dev/null || [ -z "$(ip $what route show "$1" via "$2" dev "$3")" ] || failed=1 ;;
        nft)
            ! nft list table inet "$what" >/dev/null 2>&1 || nft delete table inet "$what" || failed=1 ;;
        esac
    done <<END
$records
END
    [ -z "$failed" ]
    rm "$state"
}
"#;

/// Functions that record a change and make it.
const CHANGES: &str = r#"
# Records a routing table and the preference of its rules, which must be unused.
use_table() {
    for family in -4 -6; do
        if ip $family rule | grep "^$1:" || ip $family route show table "$1" 2>/dev/null | grep .; then
            echo "routing table $1, or the preference $1 of rules, is in use: print this script with another --table" >&2
            exit 1
        fi
    done
    echo "table $1" >>"$state"
}

# Records the value of a kernel parameter, unless it is recorded already.
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

# Makes the addresses of a network this host's, unless they are.
add_local_route() {
    if [ -z "$(ip "$1" route show table local "$2" type local dev lo)" ]; then
        echo "route $1 $2" >>"$state"
        ip "$1" route add local "$2" dev lo
    fi
}

# Adds a route through a gateway, unless there is that route.
add_route() {
    if [ -z "$(ip "$1" route show "$2" via "$3" dev "$4")" ]; then
        echo "via $1 $2 $3 $4" >>"$state"
        ip "$1" route add "$2" via "$3" dev "$4"
    fi
}

# Adds an address to lo unless lo has it.
add_address() {
    if [ -z "$(ip addr show dev lo to "$1")" ]; then
        echo "address $1" >>"$state"
        ip addr add "$1" dev lo
    fi
}

"#;

/// Forwarding of IPv6 is one parameter for all interfaces. Setting it sets each
/// interface's own, so these are recorded before and restored after it.
const FORWARD_V6: &str = r#"for file in /proc/sys/net/ipv6/conf/*/forwarding; do
    [ "$file" = /proc/sys/net/ipv6/conf/all/forwarding ] || keep "${file#/proc/sys/}"
done
set_parameter net/ipv6/conf/all/forwarding 1
"#;

/// A script under construction.
pub(super) struct Script {
    role: Role,
    number: u32,
    /// Whether there are rules or routes.
    uses_table: bool,
    body: String,
}

/// A chain of the nft table: its name, hook and priority, and rules.
pub(super) struct Chain(
    pub(super) &'static str,
    pub(super) &'static str,
    pub(super) Vec<String>,
);

impl Script {
    pub(super) fn new(role: Role, table: Option<u32>) -> Self {
        Self {
            role,
            number: table.unwrap_or(role.table()),
            uses_table: false,
            body: String::new(),
        }
    }

    /// Starts a part with a comment on its purpose.
    pub(super) fn comment(&mut self, text: &str) {
        self.body.push('\n');
        self.body.push_str(&comment(text));
    }

    fn command(&mut self, line: &str) {
        self.body.extend([line, "\n"]);
    }

    /// Adds a routing rule that looks up this script's table.
    pub(super) fn rule(&mut self, v4: bool, what: &str) {
        let number = self.number;
        self.rule_to(v4, what, &number.to_string());
    }

    /// Adds a routing rule that looks up another table.
    pub(super) fn rule_to(&mut self, v4: bool, what: &str, table: &str) {
        let (flag, number) = (ip_flag(v4), self.number);
        self.uses_table = true;
        self.command(&format!(
            "ip {flag} rule add pref {number} {what} lookup {table}"
        ));
    }

    /// Adds a route to this script's table.
    pub(super) fn route(&mut self, v4: bool, what: &str) {
        let (flag, number) = (ip_flag(v4), self.number);
        self.uses_table = true;
        self.command(&format!("ip {flag} route replace {what} table {number}"));
    }

    /// Sets an interface's IPv4 parameter.
    pub(super) fn parameter(&mut self, interface: &str, name: &str, value: u32) {
        self.command(&format!(
            "set_parameter net/ipv4/conf/{interface}/{name} {value}"
        ));
    }

    /// Turns forwarding of IPv6 on; `public` is the interface that this host may have its
    /// default route from.
    pub(super) fn forward_v6(&mut self, public: Option<&str>) {
        if let Some(public) = public {
            let key = format!("net/ipv6/conf/{public}/accept_ra");
            self.command(
                "# A host that forwards ignores router advertisements unless accept_ra is 2.",
            );
            self.command(&format!(
                "[ \"$(cat /proc/sys/{key})\" != 1 ] || set_parameter {key} 2"
            ));
        }
        self.body.push_str(FORWARD_V6);
    }

    /// Adds an address to lo.
    pub(super) fn address(&mut self, network: &str) {
        self.command(&format!("add_address {network}"));
    }

    /// Makes the addresses of a network this host's own.
    pub(super) fn local_route(&mut self, network: IpNet) {
        let flag = ip_flag(network.addr().is_ipv4());
        self.command(&format!("add_local_route {flag} {network}"));
    }

    /// A comment on one line, as a command that can be copied.
    pub(super) fn comment_line(&mut self, command: &str) {
        self.command(&format!("#   {command}"));
    }

    /// Adds a recorded route through a gateway.
    pub(super) fn route_via(&mut self, network: IpNet, gateway: IpAddr, interface: &str) {
        let flag = ip_flag(network.addr().is_ipv4());
        self.command(&format!("add_route {flag} {network} {gateway} {interface}"));
    }

    /// Adds the nft table of this role, replacing any table of that name.
    pub(super) fn nft(&mut self, purpose: &str, chains: &[Chain]) {
        self.comment(purpose);
        let table = self.role.nft_table();
        let body = &mut self.body;
        let _ = writeln!(body, "echo \"nft {table}\" >>\"$state\"");
        // One transaction.
        let _ = writeln!(body, "nft -f - <<'END'\ntable inet {table}");
        let _ = writeln!(body, "delete table inet {table}\ntable inet {table} {{");
        for Chain(name, hook, rules) in chains {
            let _ = writeln!(body, "    chain {name} {{\n        type filter hook {hook}");
            for rule in rules {
                let _ = writeln!(body, "        {rule}");
            }
            body.push_str("    }\n");
        }
        body.push_str("}\nEND\n");
    }

    fn opening(&self, what: &str, more: &str) -> String {
        let role = self.role.name();
        let whose = match self.role {
            Role::Proxy => "the host of ppv2-proxy",
            Role::Server => "a server's host",
        };
        let text = comment(&format!(
            "{what} {whose}. `ppv2-proxy host-setup --role {role}` printed it; run it there as root.{more}"
        ));
        format!("#!/bin/sh\n{text}set -eu\nstate=/run/ppv2-host-setup-{role}\n\n{UNDO}")
    }

    /// The script that sets the host up.
    pub(super) fn set_up(&self) -> String {
        let more = " Running it twice has the same result as once. It lasts until the host is restarted. With --undo, host-setup prints the script that reverts it.";
        let mut text = self.opening("Sets up", more) + CHANGES;
        text += &comment("First reverts what an earlier run changed: replies stop for a moment.");
        text += "undo\n";
        if self.uses_table {
            let _ = writeln!(text, "use_table {}", self.number);
        }
        text + &self.body
    }

    /// The script that reverts all recorded changes.
    pub(super) fn undo(&self) -> String {
        self.opening("Reverts the setup of", "") + "\nundo\n"
    }
}

fn ip_flag(v4: bool) -> &'static str {
    if v4 { "-4" } else { "-6" }
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
