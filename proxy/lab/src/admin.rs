//! Questions to the admin address of a proxy.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::TIMEOUT;

/// Status and body of an HTTP request to the admin address.
pub fn http_get(address: SocketAddr, path: &str) -> (u16, String) {
    http(address, &format!("GET {path}"), "")
}

/// As [`http_get`], of a request with any method and more header lines.
pub fn http(address: SocketAddr, request: &str, headers: &str) -> (u16, String) {
    let (head, body) = http_whole(address, request, headers);
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body)
}

/// The head of the answer to a request, and the body.
pub fn http_whole(address: SocketAddr, request: &str, headers: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    write!(
        stream,
        "{request} HTTP/1.0\r\nhost: {address}\r\n{headers}\r\n"
    )
    .unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// The value of a metric, labels included in `name`.
pub fn metric(admin: SocketAddr, name: &str) -> u64 {
    let (status, text) = http_get(admin, "/metrics");
    assert_eq!(status, 200);
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        .unwrap_or_else(|| panic!("no metric {name} in\n{text}"))
}

/// What the first listener has dropped for `reason`, as its metric says.
pub fn dropped(admin: SocketAddr, reason: &str) -> u64 {
    let name = "ppv2_dropped_datagrams_total{listener=\"listener1\",reason=";
    metric(admin, &format!("{name}\"{reason}\"}}"))
}
