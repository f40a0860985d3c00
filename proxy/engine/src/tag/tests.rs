use std::net::{IpAddr, Ipv6Addr};

use proptest::prelude::*;

use super::*;

const HOUR: u64 = EPOCH.as_secs();

fn keys() -> TagKeys {
    TagKeys::new(std::array::from_fn(|n| u8::try_from(n).unwrap()))
}

fn addresses() -> impl Strategy<Value = SocketAddr> {
    let v4 = any::<([u8; 4], u16)>().prop_map(SocketAddr::from);
    let v6 = any::<([u8; 16], u16)>().prop_map(SocketAddr::from);
    prop_oneof![v4, v6]
}

/// `address` with one bit of address and port flipped; in IPv4-mapped form where it is
/// an IPv4 one, so that flipped bits may lead out of IPv4.
fn flipped(address: SocketAddr, bit: usize) -> SocketAddr {
    let mut bytes = address_bytes(address);
    bytes[bit / 8] ^= 1 << (bit % 8);
    let ip: [u8; 16] = bytes[..16].try_into().unwrap();
    let port = u16::from_be_bytes([bytes[16], bytes[17]]);
    (IpAddr::from(ip).to_canonical(), port).into()
}

proptest! {
    #[test]
    fn a_tag_is_valid_for_its_own_client_and_listener_alone(
        client in addresses(),
        listener in addresses(),
        now in 0u64..1 << 40,
        key_bit in 0usize..128,
    ) {
        let keys = keys();
        let tag = keys.tag(client, listener, now);
        prop_assert_eq!(keys.verify(tag, client, listener, now), Ok(()));
        for bit in 0..144 {
            let other = keys.verify(tag, flipped(client, bit), listener, now);
            prop_assert_eq!(other, Err(TagError::Wrong));
            let other = keys.verify(tag, client, flipped(listener, bit), now);
            prop_assert_eq!(other, Err(TagError::Wrong));
        }
        for bit in 0..8 * ppv2::REPLY_TAG_LEN {
            let mut value = *tag.value();
            value[bit / 8] ^= 1 << (bit % 8);
            // Another version is no tag.
            let Some(other) = ReplyTag::from_value(&value) else {
                prop_assert!(bit < 8);
                continue;
            };
            let other = keys.verify(other, client, listener, now);
            prop_assert_eq!(other, Err(TagError::Wrong));
        }
        if client != listener {
            let swapped = keys.verify(tag, listener, client, now);
            prop_assert_eq!(swapped, Err(TagError::Wrong));
        }
        let mut key = keys.key;
        key[key_bit / 8] ^= 1 << (key_bit % 8);
        let other = TagKeys::new(key).verify(tag, client, listener, now);
        prop_assert_eq!(other, Err(TagError::Wrong));
    }
}

fn pair() -> (SocketAddr, SocketAddr) {
    let client = "203.0.113.11:40000".parse().unwrap();
    (client, "[2001:db8::10]:53".parse().unwrap())
}

#[test]
fn two_epochs_are_valid_at_every_second() {
    let (keys, (client, listener)) = (keys(), pair());
    for base in [0, 500_000, 500_001] {
        let tags: Vec<_> = (base..base + 8)
            .map(|epoch| keys.tag(client, listener, epoch * HOUR))
            .collect();
        for now in (base + 3) * HOUR..(base + 5) * HOUR {
            let results: Vec<_> = tags
                .iter()
                .map(|tag| keys.verify(*tag, client, listener, now))
                .collect();
            let current = usize::try_from(now / HOUR - base).unwrap();
            let also = match now % HOUR < HOUR / 2 {
                true => current - 1,
                false => current + 1,
            };
            for (epoch, result) in results.into_iter().enumerate() {
                let expected = if epoch == current || epoch == also {
                    Ok(())
                } else if epoch.abs_diff(current) == 2 || epoch.abs_diff(also) == 2 {
                    Err(TagError::OtherEpoch)
                } else {
                    Err(TagError::Wrong)
                };
                assert_eq!(result, expected, "tag of {epoch} at {now}");
            }
        }
    }
}

#[test]
fn a_tag_is_valid_for_half_an_hour_and_for_no_more_than_ninety_minutes() {
    let (keys, (client, listener)) = (keys(), pair());
    for made in 1_000_000 * HOUR..1_000_001 * HOUR {
        let tag = keys.tag(client, listener, made);
        let at = |now| keys.verify(tag, client, listener, now);
        assert_eq!(at(made + HOUR / 2), Ok(()));
        assert_eq!(at(made - HOUR / 2), Ok(()));
        assert_eq!(at(made + HOUR * 3 / 2), Err(TagError::OtherEpoch));
    }
}

#[test]
fn an_ipv4_address_is_the_same_in_an_ipv6_socket() {
    let (keys, (client, listener)) = (keys(), pair());
    let IpAddr::V4(v4) = client.ip() else {
        panic!("{client} is an IPv4 address");
    };
    let mapped: Ipv6Addr = v4.to_ipv6_mapped();
    let mapped = SocketAddr::from((mapped, client.port()));
    let tag = keys.tag(mapped, listener, HOUR);
    assert_eq!(tag, keys.tag(client, listener, HOUR));
    assert_eq!(keys.verify(tag, client, listener, HOUR), Ok(()));
}

/// Computed by another implementation of SipHash.
const TAG_OF_EPOCH_500_001: [u8; ppv2::REPLY_TAG_LEN] =
    [0x01, 0x01, 0xd0, 0xb2, 0x83, 0x94, 0x77, 0x27, 0x2d, 0x15];

/// Replicas of another version must make the same tags.
#[test]
fn tags_stay_the_same_from_version_to_version() {
    let (client, listener) = pair();
    let tag = keys().tag(client, listener, 500_001 * HOUR);
    assert_eq!(*tag.value(), TAG_OF_EPOCH_500_001);
}

#[test]
fn a_tag_shows_nothing_of_the_key() {
    assert_eq!(format!("{:?}", keys()), "TagKeys { .. }");
    assert_ne!(TagKeys::random().unwrap(), TagKeys::random().unwrap());
}
