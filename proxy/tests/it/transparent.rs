//! Mode `transparent` across hosts: the server sees the client as the source,
//! its replies are routed to the proxy and leave from the listener's address.

use ppv2_lab::network::*;
use ppv2_lab::test_name;

const ANY_PORT: ModeTest = ModeTest {
    scheme: Scheme::Transparent,
    mode: "mode = \"transparent\"",
    capabilities: NET_RAW,
    answering: Answering::Back,
    port: false,
    through_proxy: true,
};

#[test]
fn the_server_sees_the_clients_address() {
    ANY_PORT.run(test_name!(), Side::Private);
}

#[test]
fn the_server_sees_the_clients_port_on_request() {
    let test = ModeTest {
        mode: "mode = \"transparent\"\nsource_port = \"client\"",
        capabilities: NET_RAW | NET_BIND_SERVICE,
        port: true,
        ..ANY_PORT
    };
    test.run(test_name!(), Side::Private);
}
