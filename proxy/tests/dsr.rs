//! Mode `dsr` across hosts: the server's replies reach the client as the
//! listener's, and never the proxy, whoever rewrites them.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod common;

use common::lab::*;

const REWRITTEN_ON_PROXY: Story = Story {
    scheme: Scheme::RewriteOnProxy,
    mode: "mode = \"dsr\"\nrewrite_on = \"proxy\"",
    capabilities: NET_RAW | NET_BIND_SERVICE,
    way: Way::Back,
    port: true,
    through_proxy: false,
};

#[test]
fn the_proxys_host_rewrites_replies() {
    REWRITTEN_ON_PROXY.holds("the_proxys_host_rewrites_replies", Side::Private);
}

#[test]
fn the_servers_host_rewrites_replies() {
    let story = Story {
        scheme: Scheme::RewriteOnServer,
        mode: "mode = \"dsr\"\nrewrite_on = \"server\"",
        ..REWRITTEN_ON_PROXY
    };
    story.holds("the_servers_host_rewrites_replies", Side::Public);
}

/// The proxy needs no capability.
const BY_HEADER: Story = Story {
    scheme: Scheme::Sdk,
    mode: "mode = \"dsr\"\nrewrite_on = \"sdk\"",
    capabilities: 0,
    way: Way::ByHeader,
    port: true,
    through_proxy: false,
};

#[test]
fn the_server_answers_from_the_destination_in_the_header() {
    BY_HEADER.holds(
        "the_server_answers_from_the_destination_in_the_header",
        Side::Public,
    );
}

#[test]
fn the_server_answers_so_by_way_of_the_proxys_host() {
    let story = Story {
        scheme: Scheme::SdkByProxy,
        ..BY_HEADER
    };
    story.holds(
        "the_server_answers_so_by_way_of_the_proxys_host",
        Side::Private,
    );
}
