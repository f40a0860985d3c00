//! Any bytes, as a datagram with an SPP header or with text of version 1; and any two
//! addresses and a payload, which must read back as they were written.
#![no_main]

use std::net::{IpAddr, SocketAddr};

use libfuzzer_sys::fuzz_target;
use ppv2::spp::{self, SPP_HEADER_LEN, SppHeader};

#[path = "../../ppv2/tests/common/invariants.rs"]
#[allow(dead_code)]
mod invariants;

fuzz_target!(|datagram: &[u8]| {
    invariants::check_spp(datagram);
    invariants::check_v1(datagram);

    // The same bytes taken for addresses and ports, whatever the magic number is.
    if let Some((bytes, payload)) = datagram.split_first_chunk::<SPP_HEADER_LEN>() {
        let address = |ip: usize, port: usize| {
            let ip: [u8; 16] = bytes[ip..ip + 16].try_into().unwrap();
            let port = u16::from_be_bytes([bytes[port], bytes[port + 1]]);
            SocketAddr::new(IpAddr::from(ip), port)
        };
        let (client, proxy) = (address(2, 34), address(18, 36));
        let mut buffer = [0; SPP_HEADER_LEN];
        let header = spp::encode(client, proxy, &mut buffer).expect("fits");
        let written = [header, payload].concat();
        let canonical =
            |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let expected = SppHeader {
            client: canonical(client),
            proxy: canonical(proxy),
        };
        assert_eq!(spp::decode(&written), Ok((expected, payload)));
        assert_eq!(written[2..], datagram[2..]);
    }
});
