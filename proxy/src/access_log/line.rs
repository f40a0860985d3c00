//! A line of the access log: what it says of a session, in the order that is configured.

use std::fmt::Write as _;
use std::time::SystemTime;

use serde::{Serialize, Serializer};

use crate::config::{LogField, LogFormat};
use ppv2_engine::session::Ended;

/// A line. Fields that the session has no value for are not in it.
pub(super) struct Line<'e>(Vec<(LogField, Value<'e>)>);

#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Value<'e> {
    /// A name that the configuration chose.
    Name(&'e str),
    Text(String),
    Number(u64),
    Seconds(f64),
}

impl<'e> Line<'e> {
    pub(super) fn of(ended: &'e Ended, time: SystemTime, fields: &[LogField]) -> Self {
        let fields = fields.iter();
        let value = |field: &LogField| Some((*field, value(ended, time, *field)?));
        Self(fields.filter_map(value).collect())
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &(LogField, Value<'e>)> {
        self.0.iter()
    }

    /// Without the end of the line.
    pub(super) fn text(&self, format: LogFormat) -> String {
        match format {
            LogFormat::Json => serde_json::to_string(self).unwrap_or_default(),
            LogFormat::Text => {
                let mut text = String::new();
                for (field, value) in self.values() {
                    // A time in front needs no name.
                    let is_first = text.is_empty();
                    if !is_first {
                        text.push(' ');
                    }
                    if !(is_first && *field == LogField::Time) {
                        text.push_str(field.name());
                        text.push('=');
                    }
                    value.push_to(&mut text);
                }
                text
            }
        }
    }
}

impl Serialize for Line<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.values().map(|(field, value)| (field.name(), value)))
    }
}

impl Value<'_> {
    fn push_to(&self, text: &mut String) {
        let _ = match self {
            Self::Name(name) => write!(text, "{name:?}"),
            Self::Text(value) => write!(text, "{value}"),
            Self::Number(number) => write!(text, "{number}"),
            Self::Seconds(seconds) => write!(text, "{seconds}"),
        };
    }

    /// As it is, without quotation marks.
    pub(super) fn plain(&self) -> String {
        match self {
            Self::Name(name) => (*name).to_owned(),
            Self::Text(_) | Self::Number(_) | Self::Seconds(_) => {
                let mut text = String::new();
                self.push_to(&mut text);
                text
            }
        }
    }
}

fn value(ended: &Ended, time: SystemTime, field: LogField) -> Option<Value<'_>> {
    let client = ended.key.client.0;
    Some(match field {
        LogField::Time => Value::Text(humantime::format_rfc3339_millis(time).to_string()),
        LogField::Listener => Value::Name(&ended.listener.name),
        LogField::Client => Value::Text(client.to_string()),
        LogField::ClientIp => Value::Text(client.ip().to_string()),
        LogField::ClientPort => Value::Number(client.port().into()),
        LogField::Local => Value::Text(ended.key.local.to_string()),
        LogField::Upstream => Value::Name(&ended.server.upstream),
        LogField::Server => Value::Name(&ended.server.name),
        LogField::Requests => Value::Number(ended.requests.datagrams),
        LogField::RequestBytes => Value::Number(ended.requests.bytes),
        LogField::Replies => Value::Number(ended.replies.datagrams),
        LogField::ReplyBytes => Value::Number(ended.replies.bytes),
        // From the first datagram to the last.
        LogField::Seconds => Value::Seconds((ended.lasted.as_secs_f64() * 1e3).round() / 1e3),
        LogField::Reason => Value::Text(ended.reason.label().to_owned()),
        // The proxy in front that the latest datagram came through.
        LogField::Proxy => Value::Text(ended.proxy?.to_string()),
        // Of the session, in its headers, if they carry one.
        LogField::UniqueId => Value::Text(ended.unique_id?.to_string()),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use ppv2_engine::address::{ClientAddr, ListenerAddr, ServerAddr};
    use ppv2_engine::counters::EndReason;
    use ppv2_engine::listener::Listener;
    use ppv2_engine::own_tlvs::UniqueId;
    use ppv2_engine::server::Server;
    use ppv2_engine::session::{Amount, Key};

    pub(in crate::access_log) fn ended() -> Ended {
        let server = ServerAddr("192.0.2.10:53".parse().unwrap());
        Ended {
            proxy: Some("192.0.2.7:6000".parse().unwrap()),
            unique_id: Some(UniqueId([0xab; 16])),
            listener: Listener::new("dns", 1),
            server: Server::new("resolvers", "192.0.2.10:53", server, 1),
            key: Key::direct(
                ClientAddr("[2001:db8::1]:5000".parse().unwrap()),
                ListenerAddr("[2001:db8::2]:53".parse().unwrap()),
            ),
            requests: Amount {
                datagrams: 2,
                bytes: 60,
            },
            replies: Amount {
                datagrams: 1,
                bytes: 400,
            },
            lasted: Duration::from_micros(1_234_567),
            reason: EndReason::Idle,
        }
    }

    #[test]
    fn a_line_has_all_fields_of_a_session() {
        let mut ended = ended();
        let line = Line::of(&ended, SystemTime::UNIX_EPOCH, &LogField::USUAL);
        assert_eq!(
            line.text(LogFormat::Text),
            "1970-01-01T00:00:00.000Z listener=\"dns\" client=[2001:db8::1]:5000 \
             local=[2001:db8::2]:53 upstream=\"resolvers\" server=\"192.0.2.10:53\" requests=2 \
             request_bytes=60 replies=1 reply_bytes=400 seconds=1.235 reason=idle \
             proxy=192.0.2.7:6000 unique_id=abababababababababababababababab"
        );
        assert_eq!(
            line.text(LogFormat::Json),
            "{\"time\":\"1970-01-01T00:00:00.000Z\",\"listener\":\"dns\",\
             \"client\":\"[2001:db8::1]:5000\",\"local\":\"[2001:db8::2]:53\",\
             \"upstream\":\"resolvers\",\"server\":\"192.0.2.10:53\",\"requests\":2,\
             \"request_bytes\":60,\"replies\":1,\"reply_bytes\":400,\"seconds\":1.235,\
             \"reason\":\"idle\",\"proxy\":\"192.0.2.7:6000\",\
             \"unique_id\":\"abababababababababababababababab\"}"
        );

        (ended.proxy, ended.unique_id) = (None, None);
        let line = Line::of(&ended, SystemTime::UNIX_EPOCH, &LogField::USUAL);
        for format in [LogFormat::Text, LogFormat::Json] {
            let text = line.text(format);
            assert!(!text.contains("proxy") && !text.contains("unique_id"));
        }
    }

    #[test]
    fn a_line_has_the_configured_fields_in_their_order() {
        let ended = ended();
        let fields = [
            LogField::ClientIp,
            LogField::ClientPort,
            LogField::Listener,
            LogField::Time,
        ];
        let line = Line::of(&ended, SystemTime::UNIX_EPOCH, &fields);
        assert_eq!(
            line.text(LogFormat::Text),
            "client_ip=2001:db8::1 client_port=5000 listener=\"dns\" \
             time=1970-01-01T00:00:00.000Z"
        );
        assert_eq!(
            line.text(LogFormat::Json),
            "{\"client_ip\":\"2001:db8::1\",\"client_port\":5000,\"listener\":\"dns\",\
             \"time\":\"1970-01-01T00:00:00.000Z\"}"
        );
    }
}
